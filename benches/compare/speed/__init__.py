"""Speed beside the peers: every job interleaved in one process, the answers checked before a time counts.

``measure`` times contenders, ``lookups``, ``clustering`` and ``coding`` are the contenders and the plan of jobs,
``settings`` starts one process for each number of threads and instruction set, ``document`` prints what was kept.
"""
