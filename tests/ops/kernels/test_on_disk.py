"""What JAX logs of a read that failed: the reason is raised again in words, so the callback's own traceback would say it twice."""

import logging

from flax_switch.ops.kernels import on_disk


def test_jax_logs_what_its_callbacks_raise_but_for_an_expert_that_cannot_be_read(caplog):
    caplog.set_level(logging.ERROR)
    for error in (ValueError("another fault"), on_disk._Unreadable()):
        try:
            raise error
        except Exception:
            logging.getLogger("jax._src.callback").exception("failed")
    (record,) = caplog.records
    assert record.exc_info[1].args == ("another fault",)
