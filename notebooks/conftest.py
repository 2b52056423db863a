"""Notebooks are tested at their smallest size, or, where COURSE_FULL=1 asks for it, at that of a laptop."""

import os

os.environ.setdefault("COURSE_PROFILE", "laptop" if os.environ.get("COURSE_FULL") == "1" else "smoke")
