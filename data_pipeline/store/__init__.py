"""Where bytes lie: a folder, an http server or an s3-compatible bucket, and how many ranges of them are fetched at once.

obstore speaks the protocols; what to fetch, how often to ask again and how much may be held is decided here.
"""
