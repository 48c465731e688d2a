"""How rounds are told in HTTP: the older wire, whose form is distances, and that of today, whose forms have artifacts.

Both have routes under one prefix; which of them a body is of, it says itself.
"""
