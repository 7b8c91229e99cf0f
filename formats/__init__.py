"""Files that people bring, as records: one parser per format.

    file -> rows (rows.py) -> Example, by its fields (parsers.py) -> Dialogue | Ranking | Prompt

Every format is parsed to one Example; each stage takes from it what it learns from (reading.py).

 - a file is recognised by its content, never by its name; a row by its fields
 - a *bad* row (broken JSON or encoding, missing field, wrong type, wrong roles, ranks that
   contradict) stops the reading with file, line and reason; with skip_bad it is left out, counted
 - an *uninformative* row (equal, tied or unannotated responses) is always left out and counted
 - what is kept but deserves a look (duplicates, empty responses) is counted as well: see Report
"""
from formats.reading import (
    read_dialogues,
    read_files,
    read_prompts,
    read_rankings,
    stream_dialogues,
)
from formats.records import (
    BadRow,
    Dialogue,
    Message,
    Messages,
    Prompt,
    Ranking,
    Record,
    Report,
    Uninformative,
    dialogue_text,
)
from formats.showing import harmless
