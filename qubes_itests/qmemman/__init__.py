"""qmemman: who has how much memory, decided from what each VM reports.

`algorithm` is arithmetic over immutable states; `decision` adds what keeps guests
safe; `balancer` carries decisions out on a `contract.MemoryBackend`; `server` and
`client` speak the socket's protocol; `timeline` records what happens.
"""
