"""The command line: ``tvm-flashinfer compile | chat | generate | inspect | mlc | doctor | bench``.

Exit codes: 0 done, 2 the user's mistake (told in a sentence, no traceback), 1 ours.
"""

from .app import main

__all__ = ["main"]
