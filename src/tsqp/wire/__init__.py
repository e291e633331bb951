"""THE LINE BETWEEN the trusted and the untrusted side: messages, codec, channel, transports.

Nothing here knows what a tensor means; payloads are bytes whose size the receiver already knows.
"""
