"""What a request passes before it reaches an endpoint: pure ASGI, one module each.

A guard that refuses raises ``ApiError``; ``Faults`` makes the answer of it. Pure ASGI, because middleware that puts a
queue between server and endpoint hides that a client has left, and then nobody stops computing for it.
"""
