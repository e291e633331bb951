"""THE LINE BETWEEN the trusted and the untrusted side: messages, codec, channel, transports.

Only ``payload.py`` knows what a tensor means; to all else payloads are bytes whose size the receiver already knows.
"""
