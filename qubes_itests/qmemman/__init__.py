"""qmemman: who has how much memory, decided from what each VM reports.

`algorithm` is arithmetic over immutable states; `decision` adds what keeps guests
safe.
"""
