"""What talks to a worker: sessions, and the operators that go through them."""
