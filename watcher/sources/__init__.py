"""Event sources: kernel events in, a dirty set out. One contract (`base`), one test suite over all of them."""
