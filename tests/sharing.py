"""Which tests of a run with several workers go to one of them.

Fixtures are made anew by every worker that needs them. Files of `TOGETHER` have some that take long, so one worker runs them; any
other test goes to whichever worker is free. Groups come first, because single tests fill what is left evenly.

xdist's own marks are not used, because pytest 9.2 and xdist 3.8 ignore them: they are written to an attribute that no node has.
"""

from xdist.scheduler import LoadScopeScheduling

TOGETHER = {
    "test_bench": "bench",
    "test_commands": "commands",
    "test_compile": "compile",
    "test_golden": "simulator",
    "test_packed": "packed",
    "test_serve": "serve",
    "test_serve_agents": "serve",
    "test_serve_grammar": "serve",
    "test_serve_process": "serve",
    "test_simulator": "simulator",
}
"""Groups, by the names of modules."""


class Sharing(LoadScopeScheduling):
    """Hands out whole groups, and single tests."""

    def _split_scope(self, nodeid: str) -> str:
        """The group of a test, else the test itself."""
        return group_of(nodeid)


def group_of(nodeid: str) -> str:
    """The group of a test; of one in no group, its own name."""
    module = nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py")
    return TOGETHER.get(module, nodeid)
