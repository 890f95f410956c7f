"""What is wrong with a command line is said in one line."""

from lowmem_reft.options.complaint import one_line

BOX = """\
╭─ Unrecognized options ───────────────────╮
│ Unrecognized options: --ran, 4           │
│ ──────────────────────────────────────── │
│ Arguments similar to --ran:              │
│     --rank INT                           │
│         Rank of the --intervention.      │
│     -o PATH, --output-dir PATH           │
│         Where it goes.                   │
│ ──────────────────────────────────────── │
│ For full helptext, run lowmem-reft --help │
╰──────────────────────────────────────────╯
"""


def test_an_unknown_option_is_named_with_those_that_are_like_it():
    assert one_line(BOX) == "Unrecognized options: --ran, 4; similar: --rank, --output-dir"


def test_a_box_without_lines_is_read_too():
    plain = BOX.translate(str.maketrans("│─╭╮", " -  ")).replace("╰", "╰")
    assert one_line(plain) == one_line(BOX)


def test_missing_options_are_named_without_their_help():
    box = """\
╭─ Required options ──────────────╮
│ Missing from lowmem-reft train: │
│     --data STR                  │
│         A file. (required)      │
│     FIRST                       │
│         Another. (required)     │
╰─────────────────────────────────╯
"""
    assert one_line(box) == "options must be given, got none of --data, FIRST"


def test_a_long_value_is_shortened():
    box = f"╭─ Value error ─╮\n│ Error parsing --rank: {'9' * 5000} │\n╰─╯\n"
    said = one_line(box)
    assert said.startswith("Error parsing --rank: 999")
    assert len(said) < 500


def test_what_is_no_box_gives_nothing():
    assert one_line("") == ""
    assert one_line("usage\n") == ""
