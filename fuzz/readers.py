"""Coverage-guided fuzzing of every reader of files that strangers make: `make fuzz` (atheris, 10 minutes).

An input chooses a format, a file of a valid source of it and damage to that file (tests/helpers/mutations.py); the
reader must answer with one of our errors or with finite tensors, in at most 2 GiB. Inputs that find something new are
kept in fuzz/corpus; one that fails is written to fuzz/crashes and printed: what it did to the file then becomes a case
of tests/teachers/test_mutations.py, because its bytes mean something else once a format is added.
"""

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import atheris

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))

with atheris.instrument_imports(include=["rsae_triton", "zipfile", "pickletools", "json"]):
    from mutations import Bytes, damaged
    from valid_files import SOURCES

    from rsae_triton.common.errors import RsaeError

warnings.simplefilter("ignore")
NAMES = sorted(SOURCES)
WORK = Path(tempfile.mkdtemp(prefix="rsae-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
VALID: dict[str, dict[Path, bytes]] = {}
COUNTS = {"executions": 0, "refused": 0, "read": 0}


def prepare() -> None:
    for name, (write, _) in SOURCES.items():
        (WORK / name).mkdir()
        write(WORK / name)
        files = [path for path in (WORK / name).rglob("*") if path.is_file() and path.name != "README.md"]
        VALID[name] = {path: path.read_bytes() for path in sorted(files)}
        SOURCES[name][1](WORK / name)  # what is imported at the first reading is not the time that an input took


def one_input(data: bytes) -> None:
    source = Bytes(data)
    name = NAMES[source.below(len(NAMES))]
    files = VALID[name]
    path = list(files)[source.below(len(files))]
    path.write_bytes(damaged(files[path], path.name, source))
    COUNTS["executions"] += 1
    try:
        tensors = SOURCES[name][1](WORK / name)
    except RsaeError:
        COUNTS["refused"] += 1
    else:
        COUNTS["read"] += 1
        for key, one in tensors.items():
            if name != "store" and one.is_floating_point() and not bool(one.isfinite().all()):
                raise AssertionError(f"{key} of {name} was read and is not finite")
    finally:
        path.write_bytes(files[path])


def main() -> None:
    seconds = int(os.environ.get("FUZZ_SECONDS", "600"))
    prepare()
    for folder in ("corpus", "crashes"):
        (HERE / folder).mkdir(exist_ok=True)
    started = time.time()

    def until(data: bytes) -> None:
        one_input(data)
        if time.time() - started > seconds:
            # libFuzzer ends the process without Python's exit handlers.
            print(f"{COUNTS['executions']} executions, {COUNTS['refused']} refused, {COUNTS['read']} read", flush=True)
            os._exit(0)

    limits = ["-rss_limit_mb=2048", "-timeout=30", "-max_len=64", f"-artifact_prefix={HERE / 'crashes'}/"]
    atheris.Setup([sys.argv[0], str(HERE / "corpus"), *limits], until)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
