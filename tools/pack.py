"""train_gpt.py as a program that unpacks itself: the same run, a quarter of the bytes.

    python tools/pack.py FOLDER     writes FOLDER/train_gpt.py

Code counts in the challenge's 16,000,000 bytes. What is saved goes to the weights, for the run
measures its own file. The packed file is text: LZMA in base 85 behind three lines that run it. It
takes the same variables, and its own ranks, torchrun and other packed files start it like the
readable one. tools/summary.py --record takes runs of it and puts both files into the folder.
"""

import base64
import lzma
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "train_gpt.py"
# Raw LZMA2 has no header to pay for; the dictionary holds the whole file.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
# The code runs in this module's own names, so that other processes find its functions here.
# linecache has its lines for tracebacks and for the compiler's messages.
PROGRAM = """\
import base64, linecache, lzma  # packed by tools/pack.py from {source}
code = lzma.decompress(base64.b85decode({payload!r}), lzma.FORMAT_RAW, None, {filters}).decode()
name = "{source} (unpacked)"
linecache.cache[name] = len(code), None, code.splitlines(True), name
exec(compile(code, name, "exec"))
"""


def packed(source: bytes) -> bytes:
    """The program that runs this source, as text in UTF-8."""
    payload = base64.b85encode(lzma.compress(source, lzma.FORMAT_RAW, filters=FILTERS))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
    text = PROGRAM.format(source=SOURCE, payload=payload.decode(), filters=filters)
    return text.encode()


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(sys.argv[1:]) else 2
    source = (ROOT / SOURCE).read_bytes()
    path = Path(sys.argv[1]) / SOURCE
    if path.resolve() == (ROOT / SOURCE).resolve():
        print(f"error: {path} is the readable file itself; name another folder", file=sys.stderr)
        return 2
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed(source))
    except OSError as error:
        print(f"error: cannot write {path}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size} bytes, from {len(source)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
