"""A conversation in the terminal with a base and its adapters, token by token.

The whole conversation so far is the prompt of each answer and is run anew for it: ``f7+l7`` edits
the first seven tokens of the conversation and the last seven before the answer, whatever was edited
for the answers before. Without a terminal every line of standard input is a message, and standard
output holds nothing but the answers.
"""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from lowmem_reft.base.limits import Limits
from lowmem_reft.data.chosen import ChoiceReader
from lowmem_reft.data.ends import end_ids
from lowmem_reft.data.rows import Row
from lowmem_reft.data.tokens import encode_prompts
from lowmem_reft.errors import InputError
from lowmem_reft.machine.terminal import for_stream
from lowmem_reft.methods.several import BASE, find_adapters, load_together
from lowmem_reft.options import CHAT_TEMPLATE
from lowmem_reft.runs.chosen import came_to_no_end, choices_of, why_cut
from lowmem_reft.runs.generate import continue_prompts, until_stop

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lowmem_reft.methods.several import NamedAdapter
    from lowmem_reft.options import ChatOptions

HELP = """/adapter        list what can answer
/adapter NAME   let another adapter answer from now on (__base__: none)
/base           answer the last message with the base too, to compare; not remembered
/reset          forget the conversation
/system TEXT    set the system message and forget the conversation (no TEXT: none)
/help           this
/quit           leave, as Ctrl-D does; Ctrl-C stops an answer
//TEXT          send a message that starts with /"""


def run_chat(options: ChatOptions) -> dict[str, Any]:
    """Answer the messages on standard input until it ends; return nothing to print.

    Raises:
        InputError: An option is wrong, or something cannot be loaded.
    """
    chat = load_chat(options)
    with contextlib.suppress(ValueError):  # not in the main thread
        # SIGTERM ends the program, unlike Ctrl-C; the command line restores its own handler.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # one byte that is no UTF-8 does not end a pipe
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    chat.say_how_messages_are_written()
    if is_terminal:
        chat.note("/help lists the commands; Ctrl-D leaves")
    for line in _typed(chat) if is_terminal else sys.stdin:
        if line.strip() == "/quit":
            break
        chat.take(line.strip())
    return {}


def load_chat(options: ChatOptions) -> Chat:
    """Load the base and its adapters for a conversation.

    Raises:
        InputError: An option is wrong, or something cannot be loaded.
    """
    asking = options.asking
    adapters = find_adapters(
        options.adapter,
        options.model,
        template=asking.template,
        max_length=options.max_length,
        raw=asking.raw,
    )
    model, tokenizer = load_together(options.model, adapters)
    torch.manual_seed(options.decoding.seed)
    return Chat(model, tokenizer, adapters, options)


class Chat:
    """A conversation, and who answers in it."""

    def __init__(
        self, model: Any, tokenizer: Any, adapters: Sequence[NamedAdapter], options: ChatOptions
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.adapters = {adapter.name: adapter for adapter in adapters}
        self.current = adapters[0].name
        self.system = options.system
        self.messages: list[dict[str, str]] = []
        self.were_cut: set[str] = set()
        self.is_told = options.asking.template is not None or options.asking.raw
        self.limits = Limits.of(model, tokenizer)
        self.max_length = self._find_max_length()

    def _find_max_length(self) -> int:
        """Return how many tokens a conversation may have before the answer.

        Raises:
            InputError: The base has no position for any.
        """
        new, given = self.options.decoding.max_new_tokens, self.options.max_length
        configs = getattr(self.model, "peft_config", {}).values()
        virtual = max((c.num_virtual_tokens for c in configs if c.is_prompt_learning), default=0)
        room = self.limits.room(virtual=virtual, new=new)
        if room is None:
            return given or max(4096 - new, 1)
        if room < 1:
            raise InputError(
                f"max_new_tokens must leave room for a message in the base's "
                f"{self.limits.num_positions} positions, got {new!r}; lower it"
            )
        if given is not None and given > room:
            self.note(
                f"conversations are cut to {room} tokens, not {given}: with the answer the base "
                f"has {self.limits.num_positions} positions"
            )
        return min(given or room, room)

    def take(self, line: str) -> None:
        """Obey a command or answer a message; an empty line is neither."""
        num_before = len(self.messages)
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._obey(*line.partition(" ")[::2])
            elif line:
                self.messages.append({"role": "user", "content": line.removeprefix("/")})
                answer = self.answer(self.current)
                self.messages.append({"role": "assistant", "content": answer})
        except (InputError, NotImplementedError) as error:
            del self.messages[num_before:]
            self.complain(str(error))

    def answer(self, name: str) -> str:
        """Print what an adapter, or the base, answers to the last message, and return it.

        Ctrl-C ends the answer where it is.

        Raises:
            InputError: The conversation does not suit the chat template.
        """
        asked = self.messages
        while asked[-1]["role"] != "user":
            asked = asked[:-1]
        ids = self._prompt(asked, name)
        names = [self.adapters[name].peft_name if name in self.adapters else BASE]
        decoding = self.options.decoding
        model, tokenizer = self.model, self.tokenizer
        ends = end_ids(tokenizer, chats=self._by_chat_template(name))
        choices = choices_of(self.adapters[name], decoding) if name in self.adapters else []
        streamer = _Streamer(tokenizer, decoding.stop_texts, ends, choices)
        try:
            (answer,) = continue_prompts(
                *(model, tokenizer, [ids], decoding),
                adapters=names,
                ends=ends,
                choices=[choices],
                streamer=streamer,
            )
        except KeyboardInterrupt:
            streamer.end()  # type: ignore[no-untyped-call]
            self.note("stopped")
            return streamer.visible
        own = self.adapters.get(name)
        if own is not None and came_to_no_end(answer, own) and not decoding.stop:
            self._say_why_it_was_cut(own)
        return answer.text

    def _say_why_it_was_cut(self, adapter: NamedAdapter) -> None:
        """Say it once of each adapter, where the training is why."""
        why = why_cut(adapter, self.options.decoding.max_new_tokens)
        if why and adapter.name not in self.were_cut:
            self.note(f"{adapter.name}: the answer was {why}")
            self.were_cut.add(adapter.name)

    def say_how_messages_are_written(self) -> None:
        """Say it where it is not the chat template."""
        if self._by_chat_template(self.current):
            return
        why = more = ""
        if not self.tokenizer.chat_template:
            why = "" if self.is_told else "the tokenizer has no chat template: "
        elif not self.is_told:
            why = "as in the training, "
            more = "; --template chat writes them by the chat template"
        self.note(
            f"{why}each message is written as {self._template(self.current)!r} and answered on its "
            f"own, without those before it{more}"
        )

    def note(self, text: str) -> None:
        """Say something that is no answer, unless the user wants silence."""
        if not self.options.quiet:
            self.complain(text)

    def complain(self, text: str) -> None:
        """Say something that is no answer."""
        print(for_stream(text, sys.stderr), file=sys.stderr, flush=True)

    def _obey(self, command: str, argument: str) -> None:
        argument = argument.strip()
        if command == "/help":
            self.complain(HELP)
        elif command == "/adapter":
            self._choose(argument)
        elif command == "/base":
            if not self.messages:
                self.complain("/base answers the last message, and there is none yet")
                return
            self.note(f"{BASE}{self._as_adapter(BASE)}:")
            self.answer(BASE)
        elif command in ("/reset", "/system"):
            self.messages = []
            self.system = self.system if command == "/reset" else argument or None
            if command == "/system" and not self._by_chat_template(self.current):
                self.complain("without a chat template there is no place for it")
        else:
            self.complain(f"{command} is no command; /help lists them")

    def _choose(self, name: str) -> None:
        if name in self.adapters or name == BASE:
            before, self.current = self.current, name
            if self._template(name) != self._template(before):
                if self._by_chat_template(name):
                    self.note("messages are written by the chat template")
                self.say_how_messages_are_written()
            elif self._as_adapter(name):
                self.note(f"{name}{self._as_adapter(name)}")
        elif name:
            self.complain(f"{name} is not loaded; there are {', '.join((*self.adapters, BASE))}")
        if name != self.current:
            for other in dict.fromkeys((*self.adapters, BASE)):
                self.complain(f"{'*' if other == self.current else ' '} {other}")

    def _prompt(self, asked: Sequence[dict[str, str]], name: str) -> list[int]:
        """Return the tokens of a conversation, without the oldest messages if it is too long."""
        if not self._by_chat_template(name):
            row = Row(source="message", prompt=asked[-1]["content"])
            return self._encoded(row, self._template(name))[0]
        system = [{"role": "system", "content": self.system}] if self.system else []
        for start in range(0, len(asked), 2):
            ids, is_cut = self._encoded(Row(source="chat", messages=(*system, *asked[start:])))
            if not is_cut:
                break
        if start:
            self.note(f"the first {start} messages do not fit {self.max_length} tokens any more")
        if is_cut:
            self.note(f"the message is cut, to {self.max_length} tokens with what is around it")
        return ids

    def _template(self, name: str) -> str:
        """Return how an adapter reads messages: as in its training, where that is known.

        The base is asked as the first adapter is.
        """
        first = next(iter(self.adapters.values()))
        card = self.adapters.get(name, first).card
        # What another trainer saved does not say it, and what was trained on chats had no need to.
        is_of_others = card.method is None and card.template == "{prompt}"
        if self.is_told or not (is_of_others or card.template_digest):
            return card.template
        return CHAT_TEMPLATE if self.tokenizer.chat_template else card.template

    def _by_chat_template(self, name: str) -> bool:
        return self._template(name) == CHAT_TEMPLATE

    def _as_adapter(self, name: str) -> str:
        """Return in words that the base is asked in an adapter's way, where it is."""
        template = self._template(name)
        is_own = name != BASE or self.is_told or template in ("{prompt}", CHAT_TEMPLATE)
        return "" if is_own else f", asked as the adapter is: {template!r}"

    def _encoded(self, row: Row, template: str = "{prompt}") -> tuple[list[int], bool]:
        encoded = encode_prompts(
            [row], self.tokenizer, template=template, max_length=self.max_length
        )
        ids = encoded.examples[0]["input_ids"]
        self.limits.check([row.source], [ids])
        return ids, encoded.num_cut_prompts > 0


class _Streamer(TextStreamer):
    """Prints words as they come; a stop text, and what may become one, is held back.

    ``ends`` are tokens that are not shown, special or not. What may become one of the ``choices``
    is held back until it is one, or cannot be any more.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        ends: Sequence[int] = (),
        choices: Sequence[str] = (),
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stops, self.ends, self.reader = stops, ends, ChoiceReader(choices)
        self.ids: list[int] = []
        self.text = self.visible = ""

    def put(self, value: Any) -> None:
        """Take the prompt, then one token after the other."""
        if not self.next_tokens_are_prompt:
            if int(value) in self.ends:
                return
            self.ids.append(int(value))
            if self.reader.may_become:
                text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
                self.reader.read(str(text), len(self.ids))
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is new."""
        self.text += text
        shown = until_stop(self.text, self.stops)
        if self.reader.is_over:
            shown = str(self.reader.found)
        elif self.reader.may_become and not stream_end:
            shown = ""
        elif shown == self.text and not stream_end:
            shown = shown[: len(shown) - self._num_held(shown)]
        new = for_stream(shown[len(self.visible) :], sys.stdout)
        print(new, end="\n" if stream_end else "", flush=True)
        self.visible = shown

    def _num_held(self, text: str) -> int:
        starts = [stop[:size] for stop in self.stops for size in range(1, len(stop))]
        return max((len(start) for start in starts if text.endswith(start)), default=0)


def _typed(chat: Chat) -> Iterator[str]:
    """Yield what is typed at the prompt until Ctrl-D; Ctrl-C begins the line anew."""
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 - gives input() its line editing
    while True:
        try:
            yield input(f"{chat.current}> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            chat.note("Ctrl-D or /quit leaves")
