from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.sim.trace_forms import FORMATS, sniff
from tandem.sim.trace_servegen import ServeGen, read_servegen
from tandem.sim.traces import BUNDLED, is_drawn, load_trace, window
from tandem.spec.errors import SpecError, TraceError
from tandem.spec.workload import read_trace

DATA = Path(__file__).resolve().parents[2] / "tandem" / "spec" / "data" / "traces"


def unpacked(file: str) -> list[str]:
    return gzip.decompress((DATA / file).read_bytes()).decode().splitlines()


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- what ships ---


def test_the_azure_traces_are_the_rows_of_their_files() -> None:
    for name, count, span_s in (("azure-code-2023", 8819, 3435.948056), ("azure-conversation-2023", 19_366, 3501.721937)):
        rows = list(csv.DictReader(unpacked(BUNDLED[name][1][0])))
        trace = load_trace(name)
        assert len(trace) == len(rows) == count
        assert trace.arrival_s.tolist() == [float(row["arrival_s"]) for row in rows]
        assert trace.isl.tolist() == [int(row["isl"]) for row in rows]
        assert trace.osl.tolist() == [int(row["osl"]) for row in rows]
        assert (trace.arrival_s[-1], trace.note) == (span_s, "")
        assert trace.isl.tolist() == read_trace(name).isl.tolist()


def test_mooncakes_requests_keep_their_steps_their_order_and_their_blocks() -> None:
    rows = [json.loads(line) for line in unpacked("mooncake_conversation.jsonl.gz")]
    trace = load_trace("mooncake-conversation")
    assert len(trace) == len(rows) == 12_031
    assert trace.isl.tolist() == [row["input_" + "length"] for row in rows]
    assert trace.osl.tolist() == [row["output_" + "length"] for row in rows]
    assert trace.prefix_hash is not None
    assert trace.prefix_end is not None
    assert trace.prefix_hash.tolist() == [block for row in rows for block in row["hash_ids"]]
    assert np.diff(trace.prefix_end, prepend=0).tolist() == [-(-int(isl) // trace.prefix_block) for isl in trace.isl]
    stamps = np.array([row["timestamp"] for row in rows]) / 1000
    first = (stamps - trace.arrival_s).max(), (stamps + 3.003 - trace.arrival_s).min()
    assert 0.0 <= first[0] <= first[1] <= 3.003
    gaps = np.diff(trace.arrival_s)
    assert (gaps >= 0).all()
    assert gaps.std() / gaps.mean() < 1.3 < 3.0 < np.diff(stamps).std() / np.diff(stamps).mean()
    assert trace.note == "stamps lie on a grid of 3 s and are spread uniformly within its steps, seed 0"
    other = load_trace("mooncake-conversation", seed=1)
    assert not np.array_equal(other.arrival_s, trace.arrival_s)
    assert np.array_equal(other.isl, trace.isl)


@pytest.fixture(scope="module")
def day() -> ServeGen:
    return read_servegen(*(DATA / file for file in BUNDLED["servegen-deepseek-r1"][1]), "day")


def test_a_servegen_day_has_the_requests_of_its_rates(day: ServeGen) -> None:
    rows = list(csv.DictReader(unpacked("servegen_deepseek_r1_rates.csv.gz")))
    due = sum(float(row["rate_rps"]) for row in rows) * 600
    trace = load_trace("servegen-deepseek-r1")
    assert due == pytest.approx(1_383_669, abs=1)
    assert len(trace) == pytest.approx(due, rel=0.01)
    assert trace.client is not None
    found = np.bincount(trace.client, minlength=73)
    by_client = np.zeros(73)
    for row in rows:
        by_client[int(row["client"])] += float(row["rate_rps"]) * 600
    large = by_client > 20_000
    assert large.sum() > 10
    assert found[large] == pytest.approx(by_client[large], rel=0.1)
    assert (np.diff(trace.arrival_s) >= 0).all()
    assert 86_000 < trace.arrival_s[-1] <= 86_400


def test_lengths_are_those_of_the_clients_histograms(day: ServeGen) -> None:
    trace = day.draw(seed=3, duration_s=21_600.0)
    assert trace.client is not None
    heavy = int(np.bincount(trace.client).argmax())
    row = next(
        row for line in unpacked("servegen_deepseek_r1_lengths.jsonl.gz") if (row := json.loads(line))["client"] == heavy
    )
    for column, field in ((trace.isl, "input_tokens"), (trace.osl, "output_tokens")):
        drawn = column[trace.client == heavy]
        tokens, weight = np.array(row[field]).T
        assert set(drawn.tolist()) <= set(tokens.tolist())
        mean = (tokens * weight).sum() / weight.sum()
        assert drawn.mean() == pytest.approx(mean, abs=4 * drawn.std() / np.sqrt(len(drawn)))
        common = tokens[weight.argmax()]
        assert (drawn == common).mean() == pytest.approx(weight.max() / weight.sum(), rel=0.2)


def test_a_part_of_a_day_is_that_part_of_the_whole_day(day: ServeGen) -> None:
    whole, part = day.draw(seed=5, duration_s=7200.0), day.draw(seed=5, start_s=1000.0, duration_s=1500.0)
    begin = float(window(whole, 0.0).arrival_s[0])
    first = day.draw(seed=5, start_s=0.0, duration_s=1000.0)
    rows = slice(len(first), len(first) + len(part))
    assert whole.isl[rows].tolist() == part.isl.tolist()
    assert whole.osl[rows].tolist() == part.osl.tolist()
    assert np.diff(whole.arrival_s[rows]) == pytest.approx(np.diff(part.arrival_s), abs=1e-9)
    assert begin == 0.0
    assert "from 1000 s of the day for 1500 s" in part.note


def test_scale_multiplies_the_rate_of_each_client_and_the_seed_says_which_day(day: ServeGen) -> None:
    one, four, again, other = (
        day.draw(seed=seed, scale=scale, duration_s=10_800.0) for seed, scale in ((1, 1.0), (1, 4.0), (1, 1.0), (2, 1.0))
    )
    assert len(four) == pytest.approx(4 * len(one), rel=0.03)
    assert one.arrival_s.tobytes() == again.arrival_s.tobytes()
    assert one.isl.tobytes() == again.isl.tobytes()
    assert not np.array_equal(one.isl[:100], other.isl[:100])
    with pytest.raises(SpecError, match=r"scale=100: would draw about 138,366,909 requests; at most 20,000,000"):
        day.draw(seed=1, scale=100.0)
    with pytest.raises(SpecError, match=r"start_s=90000: no request of day arrives"):
        day.draw(seed=1, start_s=90_000.0)


# --- other people's files ---

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,0\n"
LOG = "request_id,arrival_s,queued_s,input_tokens,output_tokens\na,1.0,1.5,20,2\nb,0.5,0.6,10,1\n"
MOONCAKE = [
    {"timestamp": 27, "input_" + "length": 1024, "output_" + "length": 5, "hash_ids": [7, 8]},
    {"timestamp": 30, "input_" + "length": 600, "output_" + "length": 0, "hash_ids": [7, 9]},
]
VLLM = {
    "date": "20260101",
    "backend": "vllm",
    "num_prompts": 4,
    "start_times": [30.0, 10.0, 20.0, 5.0],
    "input_" + "lens": [3, 1, 2, 8],
    "output_" + "lens": [6, 4, 0, 8],
    "errors": ["", "", "", "timed out"],
}


def record(start_ns: int, isl: int, osl: int, **about: Any) -> dict[str, Any]:
    metrics = {f"{side}_sequence_length": {"value": n, "unit": "tokens"} for side, n in (("input", isl), ("output", osl))}
    return {"metadata": {"request_start_ns": start_ns, "conversation_id": "c", **about}, "metrics": metrics}


AIPERF = [
    record(1_000, 9, 9, benchmark_phase="warmup"),
    record(2_500_000_000, 20, 2),
    record(2_000_000_000, 10, 1, benchmark_phase="profiling", conversation_id="d"),
    record(2_100_000_000, 11, 1) | {"error": {"code": 503}},
    record(2_200_000_000, 12, 1, was_cancelled=True),
]


def test_azures_own_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(AZURE)
    trace = load_trace(tmp_path / "a.csv")
    assert trace.arrival_s == pytest.approx([0.0, 4.314579])
    assert (trace.isl.tolist(), trace.osl.tolist()) == ([374, 396], [44, 1])
    assert trace.note == "1 answers of 0 tokens are taken for 1"


def test_a_log_of_served_requests_in_order_of_arrival(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(LOG)
    trace = load_trace(tmp_path / "log.csv")
    assert (trace.arrival_s.tolist(), trace.isl.tolist(), trace.osl.tolist()) == ([0.0, 0.5], [10, 20], [1, 2])


def test_vllms_detailed_result_without_what_failed(tmp_path: Path) -> None:
    trace = load_trace(jsonl(tmp_path / "v.json", [VLLM]))
    assert (trace.arrival_s.tolist(), trace.isl.tolist(), trace.osl.tolist()) == ([0.0, 20.0], [1, 3], [4, 6])
    assert trace.note == "2 requests that failed are left out"


def test_aiperfs_records_without_the_warm_up_and_what_failed(tmp_path: Path) -> None:
    trace = load_trace(jsonl(tmp_path / "profile_export.jsonl", AIPERF))
    assert (trace.arrival_s.tolist(), trace.isl.tolist(), trace.osl.tolist()) == ([0.0, 0.5], [10, 20], [1, 2])
    assert trace.client is not None
    assert trace.client[0] != trace.client[1]
    assert trace.note == "1 requests of the warm-up are left out; 2 requests that failed are left out"


def test_mooncakes_blocks_and_fine_stamps_stay(tmp_path: Path) -> None:
    trace = load_trace(jsonl(tmp_path / "m.jsonl", MOONCAKE))
    assert trace.arrival_s == pytest.approx([0.0, 0.003])
    assert trace.prefix_hash is not None
    assert trace.prefix_end is not None
    assert (trace.prefix_hash.tolist(), trace.prefix_end.tolist()) == ([7, 8, 7, 9], [2, 4])
    assert trace.osl.tolist() == [5, 1]


def test_our_own_csv_with_clients_and_prefixes_packed_or_not(tmp_path: Path) -> None:
    text = "client,arrival_s,isl,osl,prefix_hashes,more\nann,3,10,2,5 6,x\nbob,3.5,11,3,,x\nann,4,12,4,5;-7,x\n"
    (tmp_path / "t.csv").write_text(text)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    for file in ("t.csv", "t.csv.gz"):
        trace = load_trace(tmp_path / file)
        assert trace.client is not None
        assert trace.prefix_hash is not None
        assert trace.prefix_end is not None
        assert trace.arrival_s.tolist() == [0.0, 0.5, 1.0]
        assert trace.client.tolist() == [0, 1, 0]
        assert (trace.prefix_hash.tolist(), trace.prefix_end.tolist()) == ([5, 6, 5, -7], [2, 2, 4])


@pytest.fixture
def forms(tmp_path: Path) -> dict[str, Path]:
    files = {form: tmp_path / f"{form}.x" for form in FORMATS}
    files["csv"].write_text("arrival_s,isl,osl\n0,5,5\n")
    files["azure"].write_text(AZURE)
    jsonl(files["mooncake"], MOONCAKE)
    jsonl(files["vllm"], [VLLM])
    jsonl(files["aiperf"], AIPERF)
    files["servegen"] = tmp_path / "s_rates.csv.gz"
    rates = "client,window_start_s,rate_rps,iat_cv,family,shape,scale\n0,0,1.0,1,Gamma,1.0,1.0\n4,0,0.5,1,Weibull,0.5,1.0\n"
    files["servegen"].write_bytes(gzip.compress(rates.encode()))
    pairs = {"input_tokens": [[0, 0.5], [8, 0.5]], "output_tokens": [[3, 1.0]]}
    jsonl(tmp_path / "s_lengths.jsonl", [{"client": client, "window_start_s": 0, **pairs} for client in (0, 4)])
    return files


def test_every_form_is_known_by_how_it_begins(forms: dict[str, Path]) -> None:
    for form, file in forms.items():
        assert sniff(file) == form
        sniffed, named = load_trace(file), load_trace(file, format=form)
        assert sniffed.arrival_s.tobytes() == named.arrival_s.tobytes()
        assert is_drawn(file) == (form == "servegen")


def test_bins_of_no_tokens_are_taken_for_one_and_clients_keep_their_numbers(forms: dict[str, Path]) -> None:
    trace = load_trace(forms["servegen"])
    assert trace.client is not None
    assert set(trace.isl.tolist()) == {1, 8}
    assert set(trace.client.tolist()) == {0, 4}
    assert "bins of 0 tokens in 2 histograms are taken for 1" in trace.note


BAD: list[tuple[str, str, str, str]] = [
    ("azure", "a.csv", AZURE.replace("2023-11-16 18:15:50.9951690", "noon"), "a.csv line 3: TIMESTAMP='noon': must be a time"),
    ("azure", "a.csv", AZURE.replace("396", "many"), "a.csv line 3: ContextTokens='many': must be a number"),
    ("azure", "a.csv", AZURE.replace("18:15:50", "18:15:40"), "line 3: TIMESTAMP=.*must not be before the row above"),
    ("azure", "a.csv", "x,y\n1,2\n", "a.csv: has no column ContextTokens, GeneratedTokens, TIMESTAMP; needs"),
    ("vllm", "l.csv", LOG.replace("20,2", "20,0"), "l.csv line 2: output_tokens=0: must be at least 1"),
    ("vllm", "v.json", json.dumps({**VLLM, "start_times": None}), "start_times: must be a list; write .* --save-detailed"),
    ("vllm", "v.json", json.dumps({**VLLM, "start_times": [1.0]}), "has 4 entries; start_times has 1"),
    ("vllm", "v.json", json.dumps({**VLLM, "start_times": [None] * 4}), "v.json line 1 request 0: start_times=None: must be a"),
    ("mooncake", "m.jsonl", '{"timestamp": 1}\n', "m.jsonl line 1: .*=None: must be a number, a whole one"),
    ("mooncake", "m.jsonl", '{"timestamp": true}\n', "line 1: timestamp=True: must be a number"),
    ("mooncake", "m.jsonl", '{"timestamp": NaN}\n', "line 1: timestamp=nan: must be at least 0"),
    ("mooncake", "m.jsonl", "\n{\n", "m.jsonl line 2: is not JSON"),
    ("mooncake", "m.jsonl", "[1]\n", "m.jsonl line 1: must be a JSON object"),
    ("mooncake", "m.jsonl", "", "m.jsonl: holds no requests"),
    ("mooncake", "m.jsonl", json.dumps({**MOONCAKE[0], "hash_ids": 3}), "line 1: hash_ids=3: must be a list"),
    (
        "mooncake",
        "m.jsonl",
        json.dumps({**MOONCAKE[0], "hash_ids": [1.5]}),
        "line 1: hash_ids=1.5: must be a number, a whole one",
    ),
    ("mooncake", "m.jsonl", json.dumps(MOONCAKE[1]) + "\n" + json.dumps(MOONCAKE[0]), "line 2: timestamp=27: must not be"),
    ("aiperf", "p.jsonl", '{"metadata": 3}\n', "p.jsonl line 1: must have the objects metadata and metrics"),
    ("aiperf", "p.jsonl", json.dumps(record(1, 0, 1)), "input_sequence_length=0: must be at least 1"),
    ("csv", "t.csv", "arrival_s,isl,osl,client\n0,1,1,\n", "t.csv line 2: client='': must not be empty"),
    ("csv", "t.csv", "arrival_s,isl,osl,prefix_hashes\n0,1,1,3 x\n", "t.csv line 2: prefix_hashes='x': must be a number"),
]


@pytest.mark.parametrize(("form", "file", "text", "says"), BAD, ids=[f"{bad[0]}-{bad[3][:40]}" for bad in BAD])
def test_a_bad_row_is_named_with_its_file_line_field_and_value(
    tmp_path: Path, form: str, file: str, text: str, says: str
) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(TraceError, match=says) as refused:
        load_trace(tmp_path / file, format=form)
    assert "\n" not in str(refused.value)


SERVEGEN_BAD = [
    ("rates", "Gamma", "Pareto", r"line 2: family='Pareto': must be gamma or weibull"),
    ("rates", "rate_rps", "rate", r"has no column rate_rps"),
    ("rates", "0,0,1.0", "0,0,-1.0", r"line 2: rate_rps='?-1.0'?: must be at least"),
    ("rates", "4,0,0.5", "9,0,0.5", r"s_lengths.jsonl: has no lengths of client=9 at 0 s"),
    ("lengths", "[[3, 1.0]]", "[3]", r"line 1: output_tokens=\[3\]: must be a list of pairs"),
    ("lengths", "[[3, 1.0]]", "[[3, 0.5]]", r"line 1: output_tokens: must rise in tokens, with probabilities .* 0.5"),
    ("lengths", "[0, 0.5], [8, 0.5]", "[8, 0.5], [0, 0.5]", r"line 1: input_tokens: must rise in tokens"),
]


@pytest.mark.parametrize(("which", "old", "new", "says"), SERVEGEN_BAD)
def test_a_bad_day_is_refused(forms: dict[str, Path], which: str, old: str, new: str, says: str) -> None:
    rates = forms["servegen"]
    if which == "rates":
        rates.write_bytes(gzip.compress(gzip.decompress(rates.read_bytes()).decode().replace(old, new).encode()))
    else:
        lengths = rates.with_name("s_lengths.jsonl")
        lengths.write_text(lengths.read_text().replace(old, new))
    with pytest.raises(TraceError, match=says):
        load_trace(rates, format="servegen")


def test_what_cannot_be_loaded_says_what_would_do(tmp_path: Path, forms: dict[str, Path]) -> None:
    cases: list[tuple[str | Path, dict[str, Any], str]] = [
        ("azure", {}, "no such file; bundled traces are azure-code-2023, azure-conversation-2023, mooncake"),
        ("azure-code-2023", {"format": "json"}, "format='json': must be csv, azure"),
        ("azure-code-2023", {"format": "azure"}, "azure-code-2023 is csv; leave it out"),
        ("azure-code-2023", {"scale": 0}, "scale=0"),
        ("azure-code-2023", {"start_s": -1}, "start_s=-1: must be 0 or more"),
        ("azure-code-2023", {"start_s": 1e6}, "start_s=1e[+]06: no request of azure-code-2023 arrives"),
        ("azure-code-2023", {"seed": -1}, "seed=-1"),
        (jsonl(tmp_path / "o.json", [{"a": 1}]), {}, "is JSON of no form that is known"),
        (tmp_path / "s_lengths.jsonl", {}, "holds the lengths of ServeGen's clients; give the file of their rates"),
        (forms["csv"], {"format": "servegen"}, "must be called ...rates.csv"),
    ]
    for source, options, says in cases:
        with pytest.raises((SpecError, TraceError), match=says):
            load_trace(source, **options)
