import platform
import subprocess
import sys

ASK = "from warmer.cluster.actor import keep_freed_memory; print(keep_freed_memory())"


def test_malloc_takes_what_it_is_told_where_it_is_that_of_glibc():
    reported = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout
    assert reported.strip() == str(platform.libc_ver()[0] == "glibc")
