// The browser of examples. Data: sections/examples.py says how it is packed. Text from the data goes
// into the page as text only, never as markup.
const root = document.getElementById("examples");
if (root) {
  const data = JSON.parse(document.getElementById("examples-data").textContent);
  const PAGE = 10;
  const OUTCOMES = [
    ["only A is right", (a, b) => a && !b],
    ["only B is right", (a, b) => b && !a],
    ["both are right", (a, b) => a && b],
    ["both are wrong", (a, b) => !a && !b],
  ];
  const find = (name) => document.getElementById("examples-" + name);
  const control = (name) => find(name).querySelector("select, input");
  const [tasks, one, two, search] = ["task", "one", "two", "search"].map(control);
  const list = root.querySelector("ol");
  let task = null, outcome = 0, page = 0;

  const make = (name, text, css) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (css) element.className = css;
    return element;
  };
  const isRight = (answers) => 2 * answers.filter((answer) => answer % 2).length > answers.length;
  const textOf = (answer) => task.texts[answer >> 1];
  const fill = (select, names, chosen) => {
    select.replaceChildren(...names.map((name, i) => new Option(name, i, false, i === chosen)));
  };

  const buttons = OUTCOMES.map((_, i) => {
    const button = make("button");
    button.type = "button";
    button.append(make("strong"), make("span"));
    button.addEventListener("click", () => { outcome = i; page = 0; show(); });
    return button;
  });
  root.querySelector(".outcomes").append(...buttons);

  function chooseTask() {
    task = data.tasks[tasks.value];
    const places = data.pair.map((name) => task.methods.indexOf(name));
    const first = Math.max(places[0] ?? 0, 0);
    const second = places[1] >= 0 ? places[1] : -1;
    fill(one, task.methods, first);
    fill(two, task.methods, second >= 0 && second !== first ? second : first === 0 ? 1 : 0);
    page = 0;
    show();
  }

  function matches(example, words) {
    if (!words) return true;
    const answers = [...example[3][one.value], ...example[3][two.value]].map(textOf);
    const all = [example[0], example[1], task.texts[example[2]], ...answers];
    return all.join("\n").toLowerCase().includes(words);
  }

  function answerLine(name, answers) {
    const seeds = new Map();
    for (const answer of answers) seeds.set(answer, (seeds.get(answer) ?? 0) + 1);
    const value = make("dd");
    for (const [answer, count] of [...seeds].sort((a, b) => b[1] - a[1])) {
      const right = answer % 2 === 1;
      const said = data.texts ? textOf(answer) || "no answer" : right ? "right" : "wrong";
      const words = (right ? "✓ " : "✗ ") + said;
      value.append(make("span", words, right ? "good" : "bad"));
      if (answers.length > 1) {
        value.append(make("span", ` ${count} of ${answers.length} seeds`, "muted"));
      }
      value.append(make("br"));
    }
    value.lastChild.remove();
    return [make("dt", name), value];
  }

  function card(example) {
    const item = make("li");
    const answers = make("dl");
    if (data.texts) {
      answers.append(make("dt", "right answer"), make("dd", task.texts[example[2]] || "–"));
    }
    for (const [letter, select] of [["A", one], ["B", two]]) {
      const name = `${letter}: ${task.methods[select.value]}`;
      answers.append(...answerLine(name, example[3][select.value]));
    }
    item.append(make("p", example[0], "source"));
    if (data.texts) {
      item.append(make("div", example[1] || "The run did not store the prompt.", "prompt"));
    }
    item.append(answers);
    return item;
  }

  function show() {
    const words = search.value.trim().toLowerCase();
    const groups = OUTCOMES.map(() => []);
    for (const example of task.examples) {
      if (!matches(example, words)) continue;
      const a = isRight(example[3][one.value]), b = isRight(example[3][two.value]);
      groups[OUTCOMES.findIndex(([, belongs]) => belongs(a, b))].push(example);
    }
    buttons.forEach((button, i) => {
      button.children[0].textContent = groups[i].length.toLocaleString("en");
      button.children[1].textContent = OUTCOMES[i][0];
      button.setAttribute("aria-pressed", String(i === outcome));
    });
    const found = groups[outcome];
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    page = Math.min(Math.max(page, 0), last);
    list.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(card));
    if (!found.length) list.append(make("li", words ? "Nothing was found." : "There is none.", "muted"));
    const here = task.examples.length, total = task.total;
    find("note").textContent = here === total
      ? `${total.toLocaleString("en")} examples` + (words ? `, those with “${search.value.trim()}”` : "")
      : `${here.toLocaleString("en")} of ${total.toLocaleString("en")} examples are in this page, `
        + "those on which methods disagree most; the others are in the cells’ predictions.jsonl.";
    find("page").textContent = `page ${page + 1} of ${last + 1}`;
    find("before").disabled = page === 0;
    find("next").disabled = page === last;
    root.querySelector(".pages").hidden = last === 0;
  }

  const turn = (step) => { page += step; show(); root.scrollIntoView(); };
  find("before").addEventListener("click", () => turn(-1));
  find("next").addEventListener("click", () => turn(1));
  tasks.addEventListener("change", chooseTask);
  for (const control of [one, two]) control.addEventListener("change", () => { page = 0; show(); });
  search.addEventListener("input", () => { page = 0; show(); });

  fill(tasks, data.tasks.map((each) => each.task), 0);
  find("task").hidden = data.tasks.length === 1;
  root.hidden = false;
  chooseTask();
}
