"""Single-sentence classification tasks. No two tasks share a label text."""

from pituning.tasks.task import TaskDefinition

TASKS = (
    TaskDefinition(
        "sst2",
        {"0": "a negative movie review", "1": "a positive movie review"},
        texts=("sentence",),
        prompt="Movie review: {sentence}\nIs this a negative or a positive movie review?",
        hub=("stanfordnlp/sst2", None),
        hub_splits={"train": "train", "test": "validation"},
        kind="sentiment",
    ),
    TaskDefinition(
        "cr",
        {"0": "a complaint about a product", "1": "praise for a product"},
        texts=("sentence",),
        prompt="Customer: {sentence}\nIs this a complaint about a product or praise for a product?",
        kind="sentiment",
    ),
    TaskDefinition(
        "movie_reviews",
        {"0": "an unfavourable essay on a film", "1": "a favourable essay on a film"},
        prompt="Essay: {text}\nIs the essay on the film unfavourable or favourable?",
        kind="sentiment",
    ),
    TaskDefinition(
        "tweet_sentiment",
        {"0": "a gloomy tweet", "1": "a matter-of-fact tweet", "2": "a cheerful tweet"},
        prompt="Tweet: {text}\nIs the tweet gloomy, matter-of-fact or cheerful?",
        hub=("cardiffnlp/tweet_eval", "sentiment"),
        kind="sentiment",
    ),
    TaskDefinition(
        "tweet_emotion",
        {"0": "someone is angry", "1": "someone is full of joy", "2": "someone is hopeful", "3": "someone is sad"},
        prompt="Tweet: {text}\nIs the writer angry, full of joy, hopeful or sad?",
        hub=("cardiffnlp/tweet_eval", "emotion"),
        kind="emotion",
    ),
    TaskDefinition(
        "subj",
        {"0": "the opinion of a critic", "1": "a part of the plot"},
        texts=("sentence",),
        prompt="Sentence: {sentence}\nIs this the opinion of a critic or a part of the plot?",
        kind="subjectivity",
    ),
    TaskDefinition(
        "trec6",
        {
            "0": "a question about a definition or a manner",
            "1": "a question about a thing",
            "2": "a question about an abbreviation",
            "3": "a question about a person",
            "4": "a question about a place",
            "5": "a question about a number",
        },
        texts=("sentence",),
        prompt="Question: {sentence}\nWhat is the question about?",
        kind="topic",
    ),
    TaskDefinition(
        "cola",
        {"0": "an ungrammatical sentence", "1": "a well-formed sentence"},
        texts=("sentence",),
        prompt="Sentence: {sentence}\nIs the sentence ungrammatical or well-formed?",
        hub=("nyu-mll/glue", "cola"),
        hub_splits={"train": "train", "test": "validation"},
        kind="acceptability",
    ),
    TaskDefinition(
        "agnews",
        {
            "1": "news about world politics",
            "2": "news about sports",
            "3": "news about business",
            "4": "news about science and technology",
        },
        prompt="News: {text}\nIs this about world politics, sports, business or science and technology?",
        kind="topic",
    ),
)
