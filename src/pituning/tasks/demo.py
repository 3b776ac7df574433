"""The demo's tasks; their data are packaged (see ``data/demo/README.md`` for sources and licences)."""

from pituning.tasks.task import TaskDefinition

TASKS = (
    TaskDefinition(
        "movie_quotes",
        {"negative": "a disappointed film critic", "positive": "a delighted film critic"},
        prompt="Critic: {text}\nIs the critic disappointed or delighted?",
        kind="sentiment",
    ),
    TaskDefinition(
        "picture_gear",
        {
            "negative": "an unhappy remark about a camera or a DVD player",
            "positive": "a happy remark about a camera or a DVD player",
        },
        prompt="Customer: {text}\nIs the customer unhappy or happy with the device?",
        kind="sentiment",
    ),
    TaskDefinition(
        "pocket_gear",
        {
            "negative": "a frustrated owner of a phone or music player",
            "positive": "a satisfied owner of a phone or music player",
        },
        prompt="Owner: {text}\nIs the owner frustrated or satisfied?",
        kind="sentiment",
    ),
    TaskDefinition(
        "word_tone",
        {"negative": "the meaning of an unpleasant word", "positive": "the meaning of a pleasant word"},
        prompt="Definition: {text}\nIs the word unpleasant or pleasant?",
        kind="sentiment",
    ),
    TaskDefinition(
        "noun_field",
        {
            "animal": "a kind of animal",
            "artifact": "a thing made by people",
            "food": "something to eat or drink",
            "place": "a place or region",
            "plant": "a kind of plant",
        },
        prompt="Definition: {text}\nWhat kind of thing is it?",
        kind="topic",
    ),
    TaskDefinition(
        "verb_field",
        {
            "moving": "a way of moving",
            "owning": "a way of owning, giving or taking",
            "speaking": "a way of speaking",
            "thinking": "a way of thinking",
        },
        prompt="Definition: {text}\nWhat kind of action is it?",
        kind="topic",
    ),
)
