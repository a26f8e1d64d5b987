"Derived from nbs/06d_record_files.ipynb by `make tests`; edit the notebook, not this file."
import codecs, csv, gzip, io, json, re, zlib
from collections.abc import Iterator
from pathlib import Path
from vlm_lit.core import DataError
import tempfile
from fastcore.test import expect_fail, test_eq
from hypothesis import given, settings, strategies as st
from PIL import Image
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.data.record_files import BLOCK
from vlm_lit.data.record_files import JsonList
from vlm_lit.data.record_files import MAX_CELL
from vlm_lit.data.record_files import _StrictParser
from vlm_lit.data.record_files import file_kind
from vlm_lit.data.record_files import other_kind
from vlm_lit.data.record_files import scan_csv
from vlm_lit.data.record_files import scan_records
from vlm_lit.data.record_files import scan_text_file

def test_only_the_record_that_is_parsed_is_held():
    data = '[{"id": "a"},\n {"id": "é"}]'.encode()
    watch = ["self.text", "start", "end", "value"]
    stop = dict(at="if end < size", watch=watch, when="value['id'] == 'é'")
    with Breakpoint(JsonList.value, **stop) as bp:
        found = list(scan_records(io.BytesIO(data), "two.json", block=4))
    assert found == [{"id": "a"}, {"id": "é"}]
    bp.expect({"self.text": '{"id": "é"}]'}, start=0, end=11, value={"id": "é"})

def test_a_number_at_the_end_of_a_block_may_go_on():
    watch = ["self.text", "end", "size", "value"]
    with Breakpoint(JsonList.value, at="if end < size", watch=watch) as bp:
        found = list(scan_records(io.BytesIO(b"[12, 3]"), "numbers.json", block=2))
    assert found == [12, 3]
    bp.expect_each(value=[1, 12, 3, 3], end=[2, 2, 2, 1], size=[2, 3, 2, 2])

def test_a_repeated_key_is_the_error_of_its_record():
    text = '[{"id": 7, "value": "no", "value": "yes"}, {"id": 8}]'
    with Breakpoint(_StrictParser.parse, at="if not self.problem", watch="self.problem value") as bp:
        found = list(scan_records(io.BytesIO(text.encode()), "twice.json"))
    bp.expect({"self.problem": "the key 'value' is given twice; keep one"}, hit=0)
    print(found[0])
    assert isinstance(found[0], DataError) and found[1] == {"id": 8}

def test_a_row_with_a_cell_too_many_is_one_error():
    data = "question,answer\nWhat?,a box\nWhere?,there,on it\nWhen?,\n".encode()
    with Breakpoint(scan_csv, at="if len(row) == len(columns)", watch="n row") as bp:
        found = list(scan_csv(io.BytesIO(data), "three.csv"))
    bp.expect_each(n=[0, 1, 2])
    print(found[1])
    assert [found[0], found[2]] == [{"question": "What?", "answer": "a box"}, {"question": "When?"}]
    assert str(found[1]).startswith("record 1: line 3: 3 cells for 2 columns")
    with expect_fail(DataError, contains="four.csv, line 4: not UTF-8; save it as UTF-8"):
        list(scan_csv(io.BytesIO(data[:-7] + b"Caf\xe9?,a\n"), "four.csv"))

def test_a_missing_comma_is_refused_with_its_line():
    text = '[{"id": 1},\n {"id": 2}\n {"id": 3}]'
    with Breakpoint(JsonList.error, at="return _not_json", watch="why self.line i") as bp:
        try: list(scan_records(io.BytesIO(text.encode()), "bad.json"))
        except DataError as error: print(str(error).replace("; ", ";\n"))
    bp.expect(why="expected ',' or ']' after a record")
    bp.expect_return({"str(result)[:16]": "bad.json, line 3"})

def test_files_of_other_kinds_are_named():
    import gzip, io, tarfile, zipfile

    def packed(make):
        out = io.BytesIO()
        make(out)
        return out.getvalue()

    def tar(out):
        with tarfile.open(fileobj=out, mode="w") as file:
            file.addfile(tarfile.TarInfo("a"))

    def zipped(out):
        with zipfile.ZipFile(out, "w") as file: file.writestr("a", "b")

    def image(kind):
        return packed(lambda out: Image.new("RGB", (8, 8)).save(out, kind))

    for name, data, what in [
        ("a.tar", packed(tar), "a tar archive"),
        ("a.zip", packed(zipped), "a zip archive"),
        ("a.json.gz", gzip.compress(b"[]"), "compressed with gzip"),
        *[(f"a.{kind}", image(kind), "an image") for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF")],
        ("a.json", b"PAR1" + bytes(9), "a Parquet table; name it .parquet"),
        ("a.json", "[]".encode("utf-16"), "text in UTF-16"),
        ("a.json", b"%PDF-1.7", "a PDF"),
        ("a.safetensors", b"\x10" + bytes(7) + b'{"__metadata__":{}}', "weights of a model"),
    ]:
        with expect_fail(DataError, contains=f"{name} is {what}"):
            list(scan_records(io.BytesIO(data), name))
    for name, text in [("a.csv", b"[]"), ("a", b" \n{}"), ("a", b"\xef\xbb\xbf[{}]"), ("a", b"")]:
        assert other_kind(text) is None
        list(scan_records(io.BytesIO(text), name))

def test_no_record_is_lost_or_changed_in_any_layout():
    def one_level(inner):
        return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)

    leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.just("\ud83d")
    trees = st.recursive(leaves, one_level, max_leaves=6)
    values = st.dictionaries(st.text(max_size=5), trees, max_size=4)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(
        st.lists(values, min_size=1, max_size=6),
        st.booleans(),
        st.sampled_from([None, 1, "\t"]),
        st.booleans(),
        st.booleans(),
        st.integers(1, 40),
    )
    def check(records, lines, indent, ascii, bom, block):
        if not ascii:  # UTF-8 has no half characters
            records = json.loads(json.dumps(records, ensure_ascii=False).replace("\ud83d", "x"))
        if lines:
            text = "\r\n".join(json.dumps(r, ensure_ascii=ascii) for r in records) + "\n"
        else:
            text = "\n " + json.dumps(records, indent=indent, ensure_ascii=ascii) + "\n"
        data = codecs.BOM_UTF8 * bom + text.encode("utf-8")
        assert list(scan_records(io.BytesIO(data), "any.json", block)) == records

    check()

def test_broken_files_are_refused_with_their_line():
    good = '{"id": 1, "conversations": []}'
    wrong = {
        good + '\n{"id": 2,\n': "bad.json, line 2: not JSON",
        f"[{good},\n{good},\n": "bad.json, line 3: not JSON",
        f"[{good}\n{good}]": "line 2: not JSON (expected ',' or ']'",
        f"[{good},\n\n{{'id': 3}}]": "line 3: not JSON",
        f"[{good}] x": "line 1: not JSON (text after the list)",
        "[" + good: "line 1: not JSON (the list is not closed",
        f'[{good},\n{{"id": "a': "line 2: not JSON (Unterminated string starting at); the file ends in",
        f'[{good},\n{{"id": 2,': "the file ends inside a record: is it complete?",
        good + '\n{"id": ': "line 2: not JSON (Expecting value); the file ends inside a record",
        '{"id": 1,\n"conversations": []}': "expected a LLaVA JSON list or one record per line",
        "[\n" + "[" * 100_000: "line 2: not JSON (maximum recursion",
        "[\n1" + "0" * 5000 + "]": "line 2: not JSON (Exceeds the limit",
        "{}}": "line 1: not JSON",
    }
    for text, message in wrong.items():
        for block in (5, BLOCK):
            with expect_fail(DataError, contains=message):
                list(scan_records(io.BytesIO(text.encode()), "bad.json", block))
    for text in ('[\n{"id": "%s"}]', '\n{"id": "%s"}'):
        with expect_fail(DataError, contains="bad.json, line 2: not UTF-8"):
            list(scan_records(io.BytesIO((text % "é").encode("latin-1")), "bad.json", 4))

def test_the_largest_record_is_counted_in_characters_on_both_paths():
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        st.integers(-3, 3), st.sampled_from("xé😀"), st.booleans(), st.booleans(), st.integers(1, 300)
    )
    def check(more, letter, lines, first, block):
        record = {"id": letter * (100 + more - len('{"id": ""}'))}
        text = json.dumps(record, ensure_ascii=False)
        assert len(text) == 100 + more
        both = [record, {"id": 1}] if first else [{"id": 1}, record]
        texts = [json.dumps(own, ensure_ascii=False) for own in both]
        whole = "\r\n".join(texts) if lines else "[\n" + ",\n".join(texts) + "  ]"
        read = lambda: list(scan_records(io.BytesIO(whole.encode()), "any.json", block, 100))
        if more <= 0: assert read() == both
        else:
            with expect_fail(DataError, contains="a record of more than 100 characters"):
                read()

    check()
    long = b'{"id": "' + b"x" * 5000  # without an end
    for text in (long, b"[" + long):
        with expect_fail(DataError, contains="a record of more than 100 characters"):
            list(scan_records(io.BytesIO(text), "bad.json", 64, 100))

def test_repeated_keys_and_numbers_that_are_none_are_refused_wherever_they_stand():
    inside = {
        '{"id": 5, "id": 6}': "the key 'id' is given twice",
        '{"id": 5, "conversations": [{"value": "a", "value": "a"}]}': "the key 'value' is given twice",
        '{"id": 5, "x": {"y": [{"z": 1, "z": 2}]}}': "the key 'z' is given twice",
        '{"id": 5, "x": NaN}': "NaN is no JSON",
        '{"id": 5, "x": [Infinity]}': "Infinity is no JSON",
        '{"id": 5, "x": {"y": -Infinity}}': "-Infinity is no JSON",
    }
    good = '{"id": 5, "x": [{"x": 1}, {"x": 1}]}'
    for bad, message in inside.items():
        for whole in (f"{good}\n{bad}\n{good}", f"[{good},\n{bad},{good}]"):
            for block in (1, 7, BLOCK):
                first, error, last = scan_records(io.BytesIO(whole.encode()), "any.json", block)
                assert first == last == json.loads(good)
                assert isinstance(error, DataError) and message in str(error), error
                assert error.record == json.loads(bad)["id"]
    error = next(scan_records(io.BytesIO(b'{"id": [1], "id": [2]}'), "any.json"))
    test_eq(error.record, 0)

def test_rows_of_csv_files_survive():
    def write_csv(rows, delimiter, bom=False, packed=False):
        "Rows as a file."
        text = io.StringIO()
        out = csv.DictWriter(text, ["question", "a b", "é"], delimiter=delimiter)
        out.writeheader()
        out.writerows(rows)
        data = codecs.BOM_UTF8 * bom + text.getvalue().encode()
        return gzip.compress(data) if packed else data

    cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
    rows = st.fixed_dictionaries({"question": cells.map("q{}".format), "a b": cells, "é": cells})

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.lists(rows, max_size=5), st.booleans(), st.booleans(), st.booleans())
    def check(rows, tabs, bom, packed):
        name = f"rows.{'tsv' if tabs else 'csv'}{'.gz' if packed else ''}"
        file = io.BytesIO(write_csv(rows, "\t" if tabs else ",", bom, packed))
        wanted = [{key: cell for key, cell in row.items() if cell} for row in rows]
        test_eq(list(scan_text_file(file, Path(name))), wanted)

    check()
    wrong = {
        b"": "bad.csv, line 1: no columns",
        b"a,b,a\n1,2,3": "bad.csv, line 1: the column 'a' is there twice",
        b'a\n"b': "bad.csv, line 2: not CSV",
        b"a\n\xff": "not UTF-8",
        b"a\n" + b"x" * (MAX_CELL + 1): "bad.csv, line 2: not CSV (field larger than field limit",
    }
    for data, message in wrong.items():
        with expect_fail(DataError, contains=message):
            list(scan_text_file(io.BytesIO(data), Path("bad.csv")))
    whole = gzip.compress(b'{"id": 1}\n' * 999)
    bits = bytearray(whole)
    bits[-9] ^= 255
    for data in (whole[:-9], b"{}", whole[:30], bytes(bits)):
        with expect_fail(DataError, contains="x.jsonl.gz: not a complete gzip file"):
            list(scan_text_file(io.BytesIO(data), Path("x.jsonl.gz")))
    names = ["a.JSON", "a.jsonl.gz", "a.b.CSV.GZ", "a.tgz", "a.tar.gz", "a"]
    test_eq([file_kind(name) for name in names], [".json", ".jsonl", ".csv", ".tar", ".tar", ""])
