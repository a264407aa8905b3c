"""Reward functions by name, with options: `box_iou(threshold=0.5)`, `mine.py:f(scale=2)`."""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from perl.config import REWARD_SPEC
from perl.rewards.peers import GIVEN, PeerForm, parameters_of
from perl.types import UserError, one_line

RewardFunction = Callable[..., Any]

_GIVEN = ("prompts", "completions", *GIVEN, *(f"{name}s" for name in GIVEN))


@dataclass(frozen=True, slots=True)
class BoundReward:
    """A reward function with its options. Columns of the data never take the place of an option."""

    function: RewardFunction
    options: Mapping[str, Any] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    """Names of columns that are not handed over, as options go by them."""
    texts: bool = False
    """It takes chats as texts: one of ours, or of ms-swift's."""

    def __call__(
        self, columns: Mapping[str, Sequence[Any]], chats: Mapping[str, Sequence[Any]], **more: Any
    ) -> Any:
        """What the function gives for the columns, in the form that it was written for.

        `chats` are prompts and completions as TRL's functions take them. A function without `**columns` is given what
        it has parameters for, of `more` too.
        """
        if peer := PeerForm.of(self.function):
            return peer.call(self.function, columns, self.options)
        given = columns if self.texts else {**columns, **chats}
        named = parameters_of(self.function)
        if named and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in named.values()):
            named = None
        seen = {
            key: value
            for key, value in {**given, **more}.items()
            if key not in self.hidden and (named is None or key in named)
        }
        return self.function(**seen, **self.options)

    @property
    def reads_answer(self) -> bool:
        """Whether it cannot be called without the column `answer`, or scores nothing."""
        if peer := PeerForm.of(self.function):
            return not {"ground_truth", "reward_input"}.isdisjoint(peer.names)
        parameters = _options_of(self.function, keyword_only=False) or {}
        if "answer" in parameters:
            return parameters["answer"].default is inspect.Parameter.empty
        column = parameters.get("column")  # Of built-in rewards, the name of the gold one.
        return column is not None and self.options.get("column", column.default) == "answer"

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(
            getattr(self.function, "__call__", None)  # noqa: B004
        )


def load(spec: str, built_in: Mapping[str, RewardFunction]) -> BoundReward:
    """The function that `name`, `package.module:function` or `file.py:function` stands for.

    Options may follow in brackets, as keyword arguments with literal values. A class is made with them, and the object
    called (ms-swift). Raises UserError for what is not known, does not load, or is no option of the function.
    """
    match = REWARD_SPEC.fullmatch(spec.strip())
    if match is None:
        raise UserError(
            f"reward '{spec}' cannot be read; write a name, package.module:function or "
            "file.py:function, with options as in box_iou(threshold=0.5)"
        )
    name, module = match["name"], match["module"]
    options = (
        read_options(f"reward '{spec}'", match["options"]) if match["options"] is not None else {}
    )
    if module is None and name not in built_in:
        raise UserError(
            f"unknown reward function '{name}'{_nearest(name, built_in)}; known are "
            f"{', '.join(built_in)}, or write package.module:function or file.py:function"
        )
    function = built_in[name] if module is None else _from_module(module, name, spec)
    known = _options_of(function, keyword_only=module is None)
    for key in options:
        if known is not None and key not in known:
            there = f"its options are {', '.join(known)}" if known else "it takes none"
            raise UserError(f"reward '{spec}' has no option '{key}'{_nearest(key, known)}; {there}")
    if isinstance(function, type):
        try:
            return BoundReward(function(**options), texts=True)
        except Exception as error:
            raise UserError(
                f"reward '{spec}': {name}() raised {type(error).__name__}: {one_line(error)}; write what it needs as options"
            ) from error
    if module is not None:  # What it needs besides may be columns.
        return BoundReward(function, options, frozenset(options))
    for key, parameter in (known or {}).items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            raise UserError(f"reward '{spec}' needs the option {key}, as in {name}({key}=...)")
    return BoundReward(function, options, frozenset(known or ()), texts=True)


def read_options(what: str, text: str) -> dict[str, Any]:
    """The options that stand in brackets behind a name; `what` begins the message of a UserError."""
    try:
        call = ast.parse(f"f({text}\n)", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("options are written name=value")
        options = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
        if len(options) < len(call.keywords):
            raise ValueError("options are written name=value, without **")
        return options
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else one_line(error, 80)
        raise UserError(
            f"{what}: its options cannot be read ({reason}); write them as in "
            "name(option=0.5), with numbers, texts in quotes, True, False, None or lists"
        ) from error


def _options_of(
    function: RewardFunction, keyword_only: bool
) -> Mapping[str, inspect.Parameter] | None:
    """The parameters that an option may name; None where Python cannot tell."""
    if (parameters := parameters_of(function)) is None:
        return None
    kinds = {inspect.Parameter.KEYWORD_ONLY}
    if not keyword_only:
        kinds.add(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {k: p for k, p in parameters.items() if p.kind in kinds and k not in _GIVEN}


def _from_module(module_name: str, name: str, spec: str) -> RewardFunction:
    try:
        if module_name.endswith(".py"):
            module = _import_file(Path(module_name).resolve())
        else:
            module = importlib.import_module(module_name)
    except FileNotFoundError as error:
        raise UserError(f"reward '{spec}': {one_line(error)}; correct the path") from error
    except ModuleNotFoundError as error:
        raise UserError(
            f"reward '{spec}': {error}; "
            "install it, put its folder on PYTHONPATH, or write file.py:function"
        ) from error
    except Exception as error:
        raise UserError(
            f"reward '{spec}': importing {module_name} raised {type(error).__name__}: {one_line(error)}"
        ) from error
    function = getattr(module, name, None)
    if function is None:
        raise UserError(
            f"reward '{spec}': {module_name} has no '{name}'{_nearest(name, vars(module))}"
        )
    if not callable(function):
        raise UserError(f"reward '{spec}': '{name}' is a {type(function).__name__}, not a function")
    return function


@functools.cache
def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = (
        f"perl_reward_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    )
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses look their module up there while it runs.
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
