"Derived from nbs/01a_files.ipynb by `make tests`; edit the notebook, not this file."
import errno, hashlib, json, os, platform, re, shutil, stat, sys, time
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from uuid import uuid4
from safetensors import SafetensorError
from vlm_lit.core import ConfigError, describe
import tempfile
from unittest.mock import patch
from fastcore.test import test_eq, expect_fail
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.files import CHECKSUMS
from vlm_lit.files import WriteError
from vlm_lit.files import cache_folder
from vlm_lit.files import check_checksum
from vlm_lit.files import digest
from vlm_lit.files import file_stamp
from vlm_lit.files import named_folders
from vlm_lit.files import new_folder
from vlm_lit.files import part_path
from vlm_lit.files import read_json
from vlm_lit.files import sha256
from vlm_lit.files import write_checksums
from vlm_lit.files import write_error
from vlm_lit.files import write_file
from vlm_lit.files import write_json
from vlm_lit.files import write_rows
from vlm_lit.files import write_text

def setup_module():
    global path
    os.environ["VLM_LIT_CACHE"] = tempfile.mkdtemp()
    path = Path(tempfile.mkdtemp()) / "state.json"

def test_a_file_is_replaced_in_one_step():
    write_json(path, {"step": 1})
    watch = ["sorted(p.name.split('.part')[0][:10] for p in path.parent.iterdir())", "path.read_text()"]
    watch.append("part.exists() and part.read_text()")
    with Breakpoint(write_file, at="part.replace(path)", watch=watch) as bp:
        write_json(path, {"step": 2})
    names, old, new = watch
    bp.expect({names: ["state.json", "state.json"]})
    bp.expect({old: '{\n "step": 1\n}\n', new: '{\n "step": 2\n}\n'})
    bp.expect_after({names: ["state.json"], old: '{\n "step": 2\n}\n'})

def test_a_killed_writer_leaves_the_old_file():
    def half(path):
        "Write a few bytes, and be killed."
        path.write_text('{"st')
        raise KeyboardInterrupt

    write_json(path, {"step": 2})
    in_place = path.with_name("in_place.json")
    in_place.write_text(path.read_text())
    with Breakpoint(write_file, at="apply_umask(part)") as bp:
        with expect_fail(KeyboardInterrupt): write_file(path, half)
        with expect_fail(KeyboardInterrupt): half(in_place)
    test_eq((bp.hits, read_json(path)), ([], {"step": 2}))  # the rename was never reached
    with expect_fail(ConfigError, contains="cannot read"): read_json(in_place)
    print("renamed: ", path.read_text().split())
    print("in place:", in_place.read_text().split())

def test_a_folder_is_there_completely_or_not_at_all():
    place = Path(tempfile.mkdtemp())
    with expect_fail(KeyboardInterrupt):
        with new_folder(place / "new") as part:
            (part / "half").write_text("x")
            raise KeyboardInterrupt
    test_eq(list(place.iterdir()), [])
    watch = ["folder.is_dir()", "[p.name for p in part.iterdir()]"]
    with Breakpoint(new_folder, at="apply_umask(part)", watch=watch) as bp:
        for text in ("first", "second"):
            with new_folder(place / "new") as part: (part / "all").write_text(text)
    test_eq([(p.name, (p / "all").read_text()) for p in place.iterdir()], [("new", "first")])
    bp.expect_each({"folder.is_dir()": [False, True]})

def test_a_flipped_bit_is_found():
    place = Path(tempfile.mkdtemp())
    weights = place / "model.safetensors"
    weights.write_bytes(b"\x00\x01\x02\x03")
    write_checksums(place)
    check_checksum(weights)
    weights.write_bytes(b"\x00\x01\x02\x07")
    with expect_fail(ConfigError, contains="model.safetensors' is damaged: its SHA-256"):
        with Breakpoint(check_checksum, at="raise ConfigError", watch=["path.stat().st_size"]) as bp:
            check_checksum(weights)
    bp.expect({"path.stat().st_size": 4, "want == sha256(path)": False})

def test_a_path_is_no_name_of_a_run():
    for name in ("./a", "../a", "~/a", ".", "..", "/a/b", Path("/a")):
        test_eq(named_folders(name), [Path(name).expanduser()])
    for name in ("a", "a/b", ".a", "...", Path("./a")):  # a `Path` has lost its `./`
        test_eq(named_folders(name), [Path(name), Path("runs") / name])

def test_rows_are_read_line_by_line():
    write_rows(path, [{"step": 1}, {"step": 2}])
    test_eq([json.loads(line) for line in path.read_text().splitlines()], [{"step": 1}, {"step": 2}])
    write_rows(path, [])
    test_eq(path.read_text(), "")
    with expect_fail(ConfigError, contains="cannot read"):
        read_json(path.with_name("gone.json"))

def test_two_writers_of_one_file_leave_the_file_of_one_of_them():
    place = Path(tempfile.mkdtemp())
    texts = {k: str(k) * (1 << 16) for k in range(4)}

    def write_often(k):
        for _ in range(8): write_text(place / "page", texts[k])
        os._exit(0)

    children = []
    for k in texts:
        child = os.fork()
        if child == 0: write_often(k)
        children.append(child)
    for child in children: test_eq(os.waitpid(child, 0)[1], 0)
    assert (place / "page").read_text() in texts.values()
    test_eq([p.name for p in place.iterdir()], ["page"])

def test_parts_of_processes_that_are_gone_are_removed_and_no_other_file():
    place = Path(tempfile.mkdtemp())
    child = os.fork()
    if child == 0:
        part_path(place / "old").write_text("half")
        (part_path(place / "folder") / "inner").mkdir(parents=True)
        os._exit(0)
    os.waitpid(child, 0)
    test_eq(len(list(place.iterdir())), 2)
    mine = part_path(place / "new")
    far, farther = (mine.with_name(f"new.{'0' * 8}-1-{k * 8}.part") for k in "12")
    others = [mine, far, place / "film.part", place / "old.0-1-2.part"]
    for file in (*others, farther): file.write_text("half")
    os.utime(farther, (0, 0))
    write_text(place / "new", "whole")
    test_eq(sorted(place.iterdir()), sorted([*others, place / "new"]))
    child = os.fork()
    if child == 0:
        part_path(place / "cache").mkdir()
        os._exit(0)
    os.waitpid(child, 0)
    with new_folder(place / "cache"): pass
    test_eq(sorted(place.iterdir()), sorted([*others, place / "new", place / "cache"]))

def test_a_full_disk_or_a_folder_of_others_is_one_line_and_the_last_state_stays():
    place = Path(tempfile.mkdtemp())
    write_json(place / "state.json", {"step": 1})

    def fails(error):
        def write(part):
            part.write_text("half")
            raise error

        return write

    errors = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "read-only")]
    errors += [SafetensorError("I/O error: No space left"), RuntimeError("inline_container.cc: failed")]
    errors += [Exception("No space left on device (os error 28)"), PermissionError(13, "denied")]
    for error in errors:
        with expect_fail(WriteError, contains="state.json': "):
            write_file(place / "state.json", fails(error))
        test_eq(("\n" in str(WriteError(place, write_error(error)))), False)
        with expect_fail(WriteError):
            write_file(place / "none" / "state.json", fails(error))
    with expect_fail(KeyError):
        write_file(place / "state.json", fails(KeyError("a bug")))
    with patch.object(Path, "unlink", lambda *_, **__: fails(errors[1])(place / "other")):
        with expect_fail(
            WriteError, contains="state.json': read-only"
        ):  # nothing can be removed either
            write_file(place / "state.json", lambda part: fails(errors[1])(place / "other"))
    (place / "other").unlink()
    test_eq((read_json(place / "state.json"), len(list(place.iterdir()))), ({"step": 1}, 1))
    for error in errors[:2]:
        with expect_fail(ConfigError, contains="set VLM_LIT_CACHE"):
            with new_folder(place / "new"): raise error
    with expect_fail(FileNotFoundError):
        with new_folder(place / "new"): (place / "gone").read_text()
    test_eq(len(list(place.iterdir())), 1)

def test_broken_json_names_its_file():
    place = Path(tempfile.mkdtemp()) / "state.json"
    for text in ("", '{"a', "[" * 100_000, "nul", "\udcff"):
        place.write_bytes(text.encode("utf-8", "surrogateescape"))
        with expect_fail(ConfigError, contains="cannot read"): read_json(place)
    for value in ([], None, "a", 1, [{}]):
        write_json(place, value)
        with expect_fail(ConfigError, contains="must hold an object"):
            read_json(place, dict)
        test_eq(read_json(place), value)

def test_checksums_are_of_weights_and_optional():
    place = Path(tempfile.mkdtemp())
    names = ["a.safetensors", "b.bin", "c.pt", "d.pth"]
    for name in (*names, "e.json"): (place / name).write_bytes(name.encode())
    for name in names: check_checksum(place / name)  # nothing is noted
    write_checksums(place)
    test_eq(list(read_json(place / CHECKSUMS)), names)
    (place / "e.json").write_text("changed")
    for name in (*names, "e.json"): check_checksum(place / name)
    (place / "new.bin").write_text("later")
    check_checksum(place / "new.bin")
    for name in names:
        (place / name).write_bytes(b"")
        with expect_fail(ConfigError, contains="is damaged"):
            check_checksum(place / name)
    (place / CHECKSUMS).write_text("[]")
    with expect_fail(ConfigError, contains="must hold an object"):
        check_checksum(place / names[0])

def test_written_files_have_the_mode_of_the_umask():
    def private(path):
        "Write as safetensors does."
        name = tempfile.mkstemp(dir=path.parent)[1]
        Path(name).rename(path)

    place = Path(tempfile.mkdtemp())
    mode = lambda path: oct(path.stat().st_mode & 0o777)
    for umask, file_mode, folder_mode in [(0o022, "0o644", "0o755"), (0o027, "0o640", "0o750")]:
        before = os.umask(umask)
        try:
            write_file(place / "weights", private)
            write_text(place / "text", "a")
            with new_folder(place / f"folder-{umask}") as part:
                (part / "inner").mkdir()
                for path in (part / "weights", part / "inner" / "weights"):
                    private(path)
        finally: os.umask(before)
        written = [place / "weights", place / "text", *(place / f"folder-{umask}").rglob("weights")]
        test_eq([mode(path) for path in written], [file_mode] * 4)
        folders = [place / f"folder-{umask}", place / f"folder-{umask}" / "inner"]
        test_eq([mode(folder) for folder in folders], [folder_mode] * 2)
        test_eq(len(list(place.iterdir())), 3 if umask == 0o022 else 4)  # no probe is left

def test_a_cache_that_cannot_be_written_says_what_to_do():
    place = Path(tempfile.mkdtemp())
    (place / "file").write_text("")
    with expect_fail(ConfigError, contains="set VLM_LIT_CACHE"):
        with new_folder(place / "file" / "new"): pass
    old = os.environ.pop("VLM_LIT_CACHE")
    try: assert cache_folder().name == "vlm_lit" and cache_folder() != Path(old)
    finally: os.environ["VLM_LIT_CACHE"] = old
    test_eq(cache_folder(), Path(old))

def test_parts_do_not_run_into_one_another():
    assert digest("ab", "c") != digest("a", "bc") and digest("ab") == digest(b"ab")
    abc = Path(tempfile.mkdtemp()) / "abc"
    abc.write_bytes(b"abc")
    test_eq(sha256(abc)[:16], "ba7816bf8f01cfea")  # of "abc", as FIPS 180-2 gives it
    before = file_stamp(abc)
    abc.write_bytes(b"abcd")
    assert file_stamp(abc) != before and file_stamp(abc)[0] == 4
