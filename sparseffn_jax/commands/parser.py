"""The command line out of dataclasses: each field is an option, and its docstring is the help.

It is argparse with what a dataclass knows: types, defaults, sentences, and dataclasses in a field,
whose fields are options too. What a command takes is cheap to import, so that help and wrong use
need no more.
"""

import argparse
import dataclasses
import difflib
import inspect
import re
import shutil
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, TypeVar

from sparseffn_jax.defaults import EMBEDDED_MODEL

# Other words for an option, those of Hugging Face's Trainer.
_ALIASES: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        "accumulate_steps": ("--gradient-accumulation-steps",),
        "clip_norm": ("--max-grad-norm",),
        "eval_every": ("--eval-steps",),
        "keep_checkpoints": ("--save-total-limit",),
        "learning_rate": ("--lr",),
        "log_every": ("--logging-steps",),
        "model": ("--model-name-or-path",),
        "out": ("--output-dir",),
        "per_device_batch_size": ("--per-device-train-batch-size",),
        "remat": ("--gradient-checkpointing",),
        "save_every": ("--save-steps",),
        "steps": ("--max-steps",),
        "window": ("--block-size",),
    }
)
# Flags that stand for an option with a value.
_SHORT: Mapping[str, tuple[str, str]] = types.MappingProxyType(
    {"--bf16": ("dtype", "bfloat16"), "--fp16": ("dtype", "float16")}
)
_WIDEST = 100


class Arguments:
    """What the dataclass of a command's arguments has beside its fields.

    Attributes:
      example: a command line that works.
      groups: the options that the help shows, by the title above them. Those that are in no group
        are shown by ``--help-all``.
    """

    example: ClassVar[str]
    groups: ClassVar[Mapping[str, tuple[str, ...]]]

    def check(self) -> None:
        """Checks what can be checked before anything is loaded.

        Raises:
          ValueError, OSError: if a value cannot be meant.
        """


A = TypeVar("A", bound=Arguments)
T = TypeVar("T")


class UsageError(ValueError):
    """The words of a command line do not fit the command."""


class Option(NamedTuple):
    """An option of a command.

    Attributes:
      path: the fields that lead to it, from the command's dataclass on.
      hint: its type, without ``None``.
      default: its default; ``dataclasses.MISSING`` if it must be given.
      help: the sentence that says what it does.
    """

    path: tuple[str, ...]
    hint: Any
    default: Any
    help: str

    @property
    def name(self) -> str:
        """The name of its field."""
        return self.path[-1]

    @property
    def flag(self) -> str:
        """What a user writes."""
        return flag_of(self.name)


def flag_of(name: str) -> str:
    """Returns the option of a field."""
    return "--" + name.replace("_", "-")


def parse(cls: type[A], prog: str, argv: Sequence[str]) -> A:
    """Returns a command's arguments; shows its help and exits if it is asked for.

    Args:
      cls: the dataclass of the command's arguments.
      prog: the words of the command, such as ``"sparseffn convert"``.
      argv: the words behind them.

    Raises:
      UsageError: if the words do not fit the command.
      ValueError: if the dataclass, or one in it, refuses its values.
    """
    # As Hugging Face's scripts do, --batch_size is taken for --batch-size.
    words = [
        re.sub(r"^--\w+", lambda m: m[0].replace("_", "-"), word) if word[:2] == "--" else word
        for word in argv
    ]
    if "--help-all" in words:
        make_parser(cls, prog, every=True).print_help()
        raise SystemExit(0)
    parser = make_parser(cls, prog)
    known = parser._option_string_actions
    for word in words:
        flag = word.partition("=")[0]
        if re.fullmatch(r"--[A-Za-z][\w-]*", flag) and flag not in known:
            raise UsageError(f"{prog} has no option {flag}{_suggestion(flag, known)}")
    given, extra = parser.parse_known_args(words)
    if extra:
        raise UsageError(f"{prog} does not know what {extra[0]!r} belongs to: see {prog} --help")
    return _build(cls, vars(given), ())


def make_parser(cls: type[Arguments], prog: str, every: bool = False) -> argparse.ArgumentParser:
    """Returns the parser of a command, whose values are named by the options' paths.

    Args:
      cls: the dataclass of the command's arguments.
      prog: the words of the command.
      every: whether the help shows every option, and not only those that are in a group.
    """
    found = list(options(cls))
    required = [f"{o.flag} {_metavar(o)}" for o in found if o.default is dataclasses.MISSING]
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *required, "[options]"]),
        description=spoken(inspect.getdoc(cls) or "", cls).partition("\n\nAttributes:")[0],
        epilog=f"example: {cls.example}",
        formatter_class=_LongFormatter if every else _Formatter,
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    by_name, flags = {option.name: option for option in found}, [o.flag for o in found]
    rest = [name for name in by_name if all(name not in group for group in cls.groups.values())]
    first = next(iter(cls.groups))
    more = f"; --help-all shows {len(rest)} more" if rest else ""
    for title, names in [*cls.groups.items(), ("more options", rest)]:
        group = parser.add_argument_group(title)
        for name in names:
            option = by_name[name]
            # Hugging Face's word for one option may be another one's own.
            others = [flag for flag in _ALIASES.get(name, ()) if flag not in flags]
            _add(group, option, others, every=every, hidden=names is rest and not every)
        if title == first:
            group.add_argument("-h", "--help", action="help", help=f"Show this page{more}.")
            group.add_argument("--help-all", action="help", help=argparse.SUPPRESS)
    return parser


def options(cls: type, path: tuple[str, ...] = (), *, described: bool = True) -> Iterator[Option]:
    """Yields the options of a dataclass, and those of the dataclasses in it.

    Args:
      cls: the dataclass.
      path: the fields that lead to it.
      described: whether to read its docstring.
    """
    hints, sentences = typing.get_type_hints(cls), _sentences(cls) if described else {}
    for field in dataclasses.fields(cls):
        hint = next(
            (h for h in typing.get_args(hints[field.name]) if _is_optional(hints[field.name])),
            hints[field.name],
        )
        here = (*path, field.name)
        if dataclasses.is_dataclass(hint):
            yield from options(typing.cast(type, hint), here, described=described)
        else:
            yield Option(here, hint, field.default, sentences.get(field.name, ""))


def spoken(text: str, cls: type) -> str:
    """Returns a message or a docstring in the words of the command line.

    Args:
      text: the text, which names options as Python does: ``batch_size``, ``steps=0``.
      cls: the dataclass whose options it names.
    """
    text = text.replace("``", "")
    for name in (option.name for option in options(cls, described=False)):
        # Not in paths, and not in other names.
        text = re.sub(rf"(?<![\w./-]){name}=True\b", flag_of(name), text)
        text = re.sub(rf"(?<![\w./-]){name}=(?=[^\s=])", f"{flag_of(name)} ", text)
        if "_" in name:
            text = re.sub(rf"(?<![\w./-]){name}\b(?![/.]\w)", flag_of(name), text)
    return text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Without the other words for an option.
        message = re.sub(r"(--[\w-]+)(/--[\w-]+)+", r"\1", message.removeprefix("argument "))
        message = message.replace("the following arguments are required:", "it needs")
        raise UsageError(f"{self.prog}: {message}")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """As argparse's, but no wider than is read well, and with the example as it is."""

    shows_every = False

    def __init__(self, prog: str):
        width = min(_WIDEST, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=30, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example:"):
            return text
        return "\n\n".join(
            super(argparse.RawDescriptionHelpFormatter, self)._fill_text(part, width, indent)
            for part in text.split("\n\n")
        )

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = list(action.option_strings)
        if isinstance(action, argparse.BooleanOptionalAction):
            flags = [flag for flag in flags if not flag.startswith("--no-")]
            if action.const is True:
                flags = [f"--[no-]{flag[2:]}" for flag in flags]
        value = "" if action.nargs == 0 else " " + self._format_args(action, str(action.metavar))
        whole = ", ".join(flags) + value
        # Hugging Face's words are shown where there is room.
        is_long = len(whole) > self._max_help_position - 4
        return flags[0] + value if is_long and not self.shows_every else whole


class _LongFormatter(_Formatter):
    shows_every = True


def _add(group: Any, option: Option, others: Sequence[str], *, every: bool, hidden: bool) -> None:
    how: dict[str, Any] = {"dest": ".".join(option.path)}
    text, default = option.help, option.default
    item = option.hint
    if typing.get_origin(item) is tuple:
        item = typing.get_args(item)[0]
        how["nargs"] = "*"
    if item is bool:
        how["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(item) is Literal:
        how |= {"choices": typing.get_args(item), "metavar": _metavar(option)}
    else:
        how |= {"type": item, "metavar": _metavar(option)}
    choices = how.get("choices", ())
    short = [
        flag for flag, (name, value) in _SHORT.items() if name == option.name and value in choices
    ]
    if not every:
        # One line, if that says what it is.
        text = text.partition(";")[0].rstrip(".") + "."
    if short:
        text += f" Short: {', '.join(short)}."
    if default is dataclasses.MISSING:
        how["required"] = True
    elif default is True:
        text += " [yes]"
    elif default not in ("", ()) and default is not None and default is not False:
        text += f" [{_default(option)}]"
    hide = argparse.SUPPRESS
    action = group.add_argument(
        option.flag, *others, help=hide if hidden else text.replace("%", "%%"), **how
    )
    if item is bool:
        # For the formatter: argparse keeps no other trace of a suppressed default.
        action.const = default is True
    for flag in short:
        value = _SHORT[flag][1]
        group.add_argument(flag, dest=how["dest"], action="store_const", const=value, help=hide)


def _metavar(option: Option) -> str:
    item = option.hint
    if typing.get_origin(item) is tuple:
        item = typing.get_args(item)[0]
    if typing.get_origin(item) is Literal:
        return "{" + ",".join(map(str, typing.get_args(item))) + "}"
    return {int: "N", float: "X", str: "TEXT"}.get(item, "PATH")


def _default(option: Option) -> str:
    default = option.default
    if default == str(EMBEDDED_MODEL):
        return "the small GPT-2 that comes with the package"
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else repr(str(default))[1:-1]


def _sentences(cls: type) -> dict[str, str]:
    """Returns what the docstrings of a dataclass and of its bases say of each field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        # Entries are indented by two, what continues them by more.
        for name, text in re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section, re.MULTILINE):
            text = " ".join(text.split()).replace("; ``None`` takes", "; the default is")
            found[name] = spoken(text[0].upper() + text[1:], cls)
    return found


def _is_optional(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint)


def _build(cls: type[T], given: Mapping[str, Any], path: tuple[str, ...]) -> T:
    values = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(typing.cast(Any, cls)):
        here, hint = (*path, field.name), hints[field.name]
        if dataclasses.is_dataclass(hint):
            values[field.name] = _build(typing.cast(type, hint), given, here)
        elif (name := ".".join(here)) in given:
            value = given[name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def _suggestion(flag: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
    inside = [other for other in known if flag.strip("-") in other]
    return f": did you mean {(near or inside)[0]}?" if near or inside else ""
