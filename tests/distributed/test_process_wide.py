"""The one place for what there is once in a process."""

from dschat.distributed.process_wide import process_wide


class Counter:
    def __init__(self) -> None:
        self.count = 0


class OtherCounter(Counter):
    pass


def test_a_class_has_one_object_and_none_of_another_class():
    process_wide(Counter).count += 1
    assert process_wide(Counter).count == 1
    assert process_wide(OtherCounter).count == 0
