"""Settings that a run has to do with."""

import time


def test_start_time_is_that_of_the_last_start(make_vm, run):
    """In whole seconds since the epoch, also when the VM has stopped."""
    vm = make_vm("work")
    assert vm.start_time is None
    begun = int(time.time())
    run(vm.start())
    assert isinstance(vm.start_time, int)
    assert begun <= vm.start_time <= time.time()
    run(vm.shutdown(wait=True))
    first, begun = vm.start_time, int(time.time())
    assert first is not None
    run(vm.start())
    assert vm.start_time >= begun
