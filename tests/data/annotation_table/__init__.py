"""One table of ways in which people's programs write annotations, and what must come out of each.

A row is a `Case`: the files of a set, and either the boxes that it means and the findings worth a word, or the message
that refuses it. To add one, append a row to the list that it belongs to; `test_annotation_table.py` reads it, checks it
and packs it. `picture(100, 80)` is an image 100 pixels wide and 80 high.
"""

from tests.data.annotation_table.box_cases import BOXES, IMAGES, ORIENTATIONS
from tests.data.annotation_table.file_cases import FILES
from tests.data.annotation_table.json_cases import IDS, TYPES
from tests.data.annotation_table.voc_cases import VOC
from tests.data.annotation_table.yolo_cases import YOLO

CASES = [*TYPES, *IDS, *BOXES, *VOC, *YOLO, *ORIENTATIONS, *IMAGES, *FILES]
