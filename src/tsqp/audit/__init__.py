"""``tsqp audit``: what reached the worker, and what somebody who wants the text can make of it."""
