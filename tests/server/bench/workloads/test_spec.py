"""The text that names a workload, and what is wrong with it."""

import re
from pathlib import Path

import pytest

from server.bench.workloads import NAMES, Common, build
from server.config.base import ConfigError

COMMON = Common("m")
MOONCAKE = "tests/data/mooncake_synthetic_trace.jsonl"


@pytest.mark.parametrize(
    ("spec", "kind", "options"),
    [
        ("zipf", "zipf", {"s": 1.1, "unique": 0}),
        ("zipf:", "zipf", {"s": 1.1}),
        ("zipf:s=0.7,unique=.2,prompts=7", "zipf", {"s": 0.7, "unique": 0.2, "prompts": 7}),
        ("search", "search", {"unique": 0.1, "prompts": 200}),
        ("conversation:turns=3", "conversation", {"turns": 3, "repeat": 0.02}),
        (f"{MOONCAKE}", "mooncake", {"scale": 1, "max_prompt_tokens": None}),
        (f"mooncake:{MOONCAKE},scale=0.5", "mooncake", {"scale": 0.5}),
        ("tests/data/azure_llm_code.csv,scale=.5", "azure", {"scale": 0.5}),
        ("server/bench/workloads/data/mt_bench_question.jsonl", "mtbench", {"turns": 1}),
        ("mtbench:turns=2", "mtbench", {"turns": 2}),
    ],
)
def test_a_text_names_a_workload(spec: str, kind: str, options: dict) -> None:
    workload = build(spec, COMMON)
    assert (workload.name, workload.kind) == (spec, kind)
    assert workload.options.model_dump().items() >= options.items()


def test_a_path_may_have_commas_and_colons(tmp_path: Path) -> None:
    file = tmp_path / "a,b:c.jsonl"
    file.write_text('{"prompt": "a"}\n')
    for spec in (str(file), f"custom:{file}"):
        assert build(spec, COMMON).kind == "custom"


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("zip", "should be a file, or the name of a workload; not 'zip': did you mean zipf?"),
        ("zip:s=1", "should be a file, or the name of a workload; not 'zip:s=1': did you mean"),
        ("zipf,s=1,unique=0", "zipf: should have a colon before its options: zipf:s=1,unique=0"),
        ("zipf:foo", "zipf: should have parts such as OPTION=VALUE, with commas between them; not"),
        ("zipf:seed=3", "zipf: unknown option 'seed'; known are s, prompts, unique, context"),
        ("zipf:promts=3", "zipf: unknown option 'promts'; did you mean prompts?"),
        ("zipf:s=-1", "zipf: s should be greater than or equal to 0, not '-1'"),
        ("zipf:s=nan", "zipf: s should be a finite number, not 'nan'"),
        ("zipf:s=", "zipf: s should be a valid number, not ''"),
        ("zipf:prompts=1.5", "zipf: prompts should be a valid integer, not '1.5'"),
        ("zipf:s=1,s=2", "zipf: s should be given once"),
        ("mooncake:scale=0.5", "mooncake: should name a file: mooncake:FILE"),
        ("mooncake:nowhere.jsonl", "nowhere.jsonl: should be a readable file: No such file or"),
        ("custom:nowhere,a=1", "custom: unknown option 'a'; there are none"),
        ("tests", "tests: should be a file, not a folder or a pipe"),
        ("custom:tests", "tests: should be a file, not a folder or a pipe"),
        ("x" * 1000, "should be a file, or the name of a workload; not 'xxx"),
        ("README.md", "README.md:1: should be JSON: "),
    ],
)
def test_a_mistake_is_named(spec: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--workload: {re.escape(problem)}"):
        build(spec, COMMON)


def test_a_file_of_another_kind_is_a_mistake(tmp_path: Path) -> None:
    for name, content in (("a.csv", "a,b\n1,2\n"), ("a.jsonl", '{"a": 1}\n'), ("b.jsonl", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=rf"{name}: should have fields conversations; or "):
            build(str(tmp_path / name), COMMON)


def test_only_some_routes_go_on_to_the_longest_answer() -> None:
    with pytest.raises(ConfigError, match=r"^--ignore-eos: should be left out, or --route be one"):
        build("zipf", Common("m", route="messages", ignore_eos=True))


def test_every_option_is_described() -> None:
    for name, options in NAMES.items():
        for option, field in options.model_fields.items():
            assert field.description, f"{name}: {option}"
