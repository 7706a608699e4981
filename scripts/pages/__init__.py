"""Pages of measured results, each drawn from stored JSON alone: ``python scripts/pages [NAME ...]``.

- `render`: which pages there are, and the command.
- `page`: what a page is; its text, its figures and its files.
- `records`: stored JSON that says where it misses something.
- `statements`: sentences that are said only while the numbers carry them.
- `tables`: tables and cells in Markdown.
- One module per page prepares its sentences, tables and figures. Its prose is in ``templates/NAME.md.j2``.
"""
