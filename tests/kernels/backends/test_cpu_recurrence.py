from tests.support.recurrence_contract import RecurrenceContract


class TestRecurrence(RecurrenceContract):
    backend = "cpu"
