"""Starters hold blanks, so they are not run as tests; the solved notebooks are."""

collect_ignore_glob = ["hw*.ipynb"]
