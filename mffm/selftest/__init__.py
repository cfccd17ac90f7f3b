"""``mffm selftest``: does a cluster compute, resume and communicate as it should, and how fast?"""
