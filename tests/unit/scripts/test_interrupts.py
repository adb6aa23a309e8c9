import subprocess
import sys

PRINT = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"


def test_a_child_of_a_test_can_be_interrupted_however_the_run_was_started() -> None:
    assert subprocess.check_output([sys.executable, "-c", PRINT], text=True) == "True\n"
