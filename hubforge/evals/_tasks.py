"""lm-eval's tasks by name, from its own collection or from a folder, set up so that scoring them twice gives the same.

Imported only once a run or a preflight has begun.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, wraps
from pathlib import Path
from typing import Any

from hubforge.errors import StepError

NLTK_DATA = Path(__file__).parent / "data" / "nltk_data"
_LANGDETECT_SEED = 0


@dataclass(frozen=True)
class Choice:
    """Which tasks, and what of them differs from how lm-eval has them."""

    names: tuple[str, ...]
    include: Path | None = None  # a folder of tasks, searched first
    documents: Sequence[Mapping[str, Any]] | None = None  # in place of the data set the task names
    num_fewshot: int | None = None
    max_gen_toks: int | None = None
    seed: int = 1234


def check_names(names: Sequence[str], include: Path | None = None) -> Any:
    """The task manager that knows all those tasks; StepError for a name that is none, with the closest.

    A task whose YAML cannot be read vanishes from lm-eval's registry without a word: its error is shown here.
    """
    for manager in _registries(names, include):
        if set(names) <= set(manager.all_tasks):
            return manager
    for name in names:
        if name in manager.all_tasks:
            continue
        if include is not None and (broken := _broken_yaml(include)):
            path, error = broken
            raise StepError(
                f"there is no task {name!r}: {path} cannot be read: {error}",
                where=str(include),
                mend="A task's `include` is relative to the file that names it.",
            )
        close = get_close_matches(name, manager.all_tasks, n=1)
        mend = f"Did you mean {close[0]!r}? " if close else ""
        raise StepError(f"lm-eval knows no task {name!r}", mend=mend + "`lm_eval ls tasks` lists them all.")
    raise AssertionError("unreachable: the last registry had a name and had it not")


def _registries(names: Sequence[str], include: Path | None) -> Iterator[Any]:
    """Task managers that may know the tasks, the quickest first and the fullest last.

    lm-eval's own fourteen thousand YAML files take seconds to read; a folder named as its task takes none.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    if include is not None:
        yield TaskManager(include_path=str(include), include_defaults=False)
        yield TaskManager(include_path=str(include))
        return
    folders = [Path(lm_eval.tasks.__file__).parent / name for name in names]
    if all(name.isidentifier() and folder.is_dir() for name, folder in zip(names, folders, strict=True)):
        manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
        kinds = [entry.kind.name for name in names if (entry := manager.task_index.get(name))]
        if kinds == ["TASK"] * len(names):  # a group may have members elsewhere
            yield manager
    yield _own_tasks()


@cache
def _own_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _broken_yaml(folder: Path) -> tuple[Path, str] | None:
    """The first YAML file of the folder that lm-eval cannot read, and why."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(folder.glob("**/*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # whatever YAML or a wrong include raises: the reader is told
            return path.relative_to(folder), " ".join(str(error).split())
    return None


def check_scorers(manager: Any, names: Sequence[str]) -> None:
    """Raise StepError when a task splits sentences and the model for it is not here: IFEval fails only at the end."""
    if not any(_uses_nltk(manager, name) for name in names):
        return
    import nltk

    if str(NLTK_DATA) not in nltk.data.path:
        nltk.data.path.append(str(NLTK_DATA))  # ours last: the user's own come first
    from nltk.tokenize.punkt import PunktTokenizer

    try:
        PunktTokenizer("english")
    except LookupError:
        raise StepError(
            "NLTK's sentence model for English (punkt_tab) is not here, and the task's scorer needs it",
            where=str(NLTK_DATA),
            mend="It comes with hubforge: install it again, or `python -m nltk.downloader punkt_tab`.",
        ) from None


def _uses_nltk(manager: Any, name: str) -> bool:
    path = manager.task_index[name].yaml_path
    folder = None if path is None else Path(path).parent
    return folder is not None and any("import nltk" in code.read_text("utf-8") for code in folder.glob("*.py"))


def load_tasks(choice: Choice, warn: Callable[[str], None]) -> dict[str, Any]:
    """What `lm_eval.evaluator.evaluate` takes: {"tasks": {name: task}, "groups": {name: group}}.

    Raises StepError for an unknown task, for documents that cannot be had, and for a task that runs the model's code.
    """
    manager = check_names(choice.names, choice.include)
    check_scorers(manager, choice.names)
    if choice.documents is not None:
        _put_documents(manager, choice)
    try:
        loaded = manager.load(list(choice.names))
    except StepError:
        raise
    except Exception as error:  # of Datasets, the Hub's client, a task's own code, in many kinds
        raise StepError(
            f"{', '.join(choice.names)} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}",
            mend="If its data set could not be had: name it under `sources` and give it as `data`.",
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise StepError(f"task {name!r} runs the code that the model writes", mend="hubforge does not do that.")
        if getattr(task, "MULTIMODAL", False):
            raise StepError(f"task {name!r} shows pictures or sounds", mend="hubforge evaluates text only.")
        _set_up(name, task, choice, warn)
    return dict(loaded)


def _put_documents(manager: Any, choice: Choice) -> None:
    """Give the one task its documents, in lm-eval's registry, in place of a download."""
    from lm_eval.tasks._yaml_loader import load_yaml

    (name,) = choice.names
    entry = manager.task_index[name]
    config = load_yaml(entry.yaml_path, resolve_func=True) if entry.yaml_path else None
    if config is None or not isinstance(config.get("task"), str) or "class" in config:
        raise StepError(f"{name!r} is a group of tasks or written in Python, so it takes no `data`")
    split = config.get("test_split") or config.get("validation_split") or config.get("training_split")
    shots = choice.num_fewshot if config.get("num_fewshot") is None else config["num_fewshot"]
    shown = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split") or split
    if shots and shown != split:
        raise StepError(
            f"{name!r} takes its {shots} examples from split {shown!r}, and `data` gives only {split!r}",
            mend="Leave `data` out, or set `num_fewshot: 0`.",
        )
    splits = {config.get(key) for key in ("test_split", "validation_split", "training_split", "fewshot_split")} - {None}
    documents = list(choice.documents or ())

    def given(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        table = Dataset.from_list([dict(document) for document in documents])
        return dict.fromkeys(splits, table)

    for key in ("dataset_kwargs", "dataset_name"):
        config.pop(key, None)
    config["custom_dataset"] = given
    entry.cfg, entry.yaml_path = config, None
    _own_tasks.cache_clear()  # the next step finds the registry as it was


def _set_up(name: str, task: Any, choice: Choice, warn: Callable[[str], None]) -> None:
    """As lm_eval.simple_evaluate does it with its arguments; and the scorer seeded."""
    if choice.max_gen_toks is not None and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value={"max_gen_toks": choice.max_gen_toks}, update=True)
    own = task.get_config("num_fewshot")
    if choice.num_fewshot is None:
        if own is None:
            task.set_config(key="num_fewshot", value=0)
    elif own == 0 and choice.num_fewshot:
        warn(f"{name} is asked without examples by its definition; num_fewshot: {choice.num_fewshot} is not used")
    else:
        task.set_config(key="num_fewshot", value=choice.num_fewshot)
    task.set_fewshot_seed(seed=choice.seed)
    task.process_results = seeded(task.process_results)


def seeded(score: Callable[..., Any]) -> Callable[..., Any]:
    """The scorer, starting from the same random state for the same document whenever it is asked.

    IFEval's draws a letter for two of its documents (google-research #3427, lm-evaluation-harness #4213).
    """

    @wraps(score)
    def process_results(doc: Mapping[str, Any], results: Any) -> Any:
        random.seed(_document_seed(doc))
        return score(doc, results)

    return process_results


def _document_seed(doc: Mapping[str, Any]) -> int:
    if isinstance(key := doc.get("key"), int):  # IFEval numbers its documents
        return key
    return zlib.crc32(json.dumps(doc, sort_keys=True, default=str).encode())


@contextmanager
def seeded_langdetect() -> Iterator[None]:
    """While it lasts langdetect, which IFEval asks for the language of a reply, gives equal text equal answers."""
    try:
        from langdetect import DetectorFactory
    except ImportError:
        yield
        return
    before = DetectorFactory.seed
    DetectorFactory.seed = _LANGDETECT_SEED
    try:
        yield
    finally:
        DetectorFactory.seed = before


def scorer_seeds() -> dict[str, Any]:
    """How the scorers were seeded, for the record."""
    return {"random": "per document, by its key", "langdetect": _LANGDETECT_SEED}
