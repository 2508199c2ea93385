"""Notes as people jot them down, with what a program would want of them: the texts of `peftx demo --llm`."""

import json

KEYS = ("what", "who", "where", "when")
TASK = "Turn the note into JSON with the keys what, who, where and when."

_TRAIN = """
Dinner with Tom at the station on Friday. | dinner | Tom | station | Friday
Call Priya from the office at nine. | call | Priya | office | nine
On Monday, football with Omar in the park. | football | Omar | park | Monday
Meet Lena in the library tomorrow for chess. | chess | Lena | library | tomorrow
Tuesday: piano lesson with Mr. Brown at the school. | piano lesson | Mr. Brown | school | Tuesday
Breakfast with Yuki in the hotel at eight. | breakfast | Yuki | hotel | eight
Carlos comes to the garage at noon for the repair. | repair | Carlos | garage | noon
Interview with Ms. Okafor in Lagos in March. | interview | Ms. Okafor | Lagos | March
Swimming with Eva at the lake on Sunday. | swimming | Eva | lake | Sunday
At six, a walk with Henrik by the river. | walk | Henrik | river | six
Visit Grandma in Leeds next week for her birthday. | birthday | Grandma | Leeds | next week
See the dentist, Dr. Novak, in the clinic on Thursday for a check. | check | Dr. Novak | clinic | Thursday
Tonight, cards with Bruno at the club. | cards | Bruno | club | tonight
Workshop with Aisha in room four on Wednesday. | workshop | Aisha | room four | Wednesday
Ravi wants to meet at the gym at seven for tennis. | tennis | Ravi | gym | seven
Coffee with Sofia on the square this afternoon. | coffee | Sofia | square | this afternoon
In May, a wedding with Paul in Rome. | wedding | Paul | Rome | May
Saturday: market with Mina at the church. | market | Mina | church | Saturday
Phone the lawyer, Mrs. Lee, from home at ten about the contract. | contract | Mrs. Lee | home | ten
Film with Jonas at the Odeon on Friday. | film | Jonas | Odeon | Friday
Nadia is at the studio tomorrow for the rehearsal. | rehearsal | Nadia | studio | tomorrow
Haircut with Leo in the salon at four. | haircut | Leo | salon | four
Next month, a conference with Ines in Porto. | conference | Ines | Porto | next month
Picnic with Ahmed in the garden on Sunday. | picnic | Ahmed | garden | Sunday
Meet Olga at the bank on Monday about the loan. | loan | Olga | bank | Monday
Concert with Felix in the old town tonight. | concert | Felix | old town | tonight
At noon, a sandwich with Kofi in the canteen. | sandwich | Kofi | canteen | noon
Wednesday: yoga with Clara at the beach. | yoga | Clara | beach | Wednesday
Peter needs me in the kitchen at five for the cake. | cake | Peter | kitchen | five
Exam with Professor Silva in hall two in June. | exam | Professor Silva | hall two | June
Take Max to the vet on Thursday for the vaccination. | vaccination | Max | vet | Thursday
Tea with Amara in the museum this morning. | tea | Amara | museum | this morning
In winter, skiing with Hugo in Austria. | skiing | Hugo | Austria | winter
Rehearse the speech with Zoe in the theatre on Saturday. | speech | Zoe | theatre | Saturday
Budget review with Daniel on the third floor at two. | budget review | Daniel | third floor | two
Tomorrow, the delivery with Mehmet at the warehouse. | delivery | Mehmet | warehouse | tomorrow
Painting with Alice in the attic on Tuesday. | painting | Alice | attic | Tuesday
Meet Ivan at the airport at midnight for the flight. | flight | Ivan | airport | midnight
Choir with Rosa in the chapel next Sunday. | choir | Rosa | chapel | next Sunday
Friday: inspection with Mr. Chen at the bridge. | inspection | Mr. Chen | bridge | Friday
"""

_TEST = """
Lunch with Maria at the harbour on Tuesday. | lunch | Maria | harbour | Tuesday
Thursday: meeting with Mrs. Adler at the town hall. | meeting | Mrs. Adler | town hall | Thursday
At three, guitar with Samir in the basement. | guitar | Samir | basement | three
Meet Greta at the zoo on Saturday for the photos. | photos | Greta | zoo | Saturday
In July, a regatta with Ole in Kiel. | regatta | Ole | Kiel | July
Job fair with Fatima at the stadium tomorrow. | job fair | Fatima | stadium | tomorrow
Victor is in the lab at eleven for the test. | test | Victor | lab | eleven
Dancing with Juan in the barn tonight. | dancing | Juan | barn | tonight
"""


def pairs(text: str) -> list[tuple[str, str]]:
    """Notes with their answers, one line of JSON each."""
    rows = [[part.strip() for part in line.split(" | ")] for line in text.strip().splitlines()]
    return [(note, json.dumps(dict(zip(KEYS, fields, strict=True)))) for note, *fields in rows]


TRAIN, TEST = pairs(_TRAIN), pairs(_TEST)


def right(answer: str, wanted: str) -> int:
    """How many of the four fields an answer has right; letters may be of either case, spaces may stand around. No JSON,
    none right."""
    try:
        found = json.loads(answer.strip())
    except ValueError:
        return 0
    if not isinstance(found, dict) or set(found) != set(KEYS):
        return 0
    return sum(str(found[key]).strip().casefold() == value.casefold() for key, value in json.loads(wanted).items())
