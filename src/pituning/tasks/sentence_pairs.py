"""Sentence-pair tasks: entailment and paraphrase. No two tasks share a label text."""

from pituning.tasks.task import TaskDefinition

TASKS = (
    TaskDefinition(
        "rte",
        {"entailment": "the second text follows from the first", "not_entailment": "the second text does not follow"},
        texts=("premise", "hypothesis"),
        prompt="Text: {premise}\nClaim: {hypothesis}\nDoes the claim follow from the text?",
        kind="sentence pairs",
    ),
    TaskDefinition(
        "qnli",
        {"entailment": "the sentence answers the question", "not_entailment": "the sentence is no answer"},
        texts=("question", "sentence"),
        prompt="Question: {question}\nSentence: {sentence}\nDoes the sentence answer the question?",
        kind="sentence pairs",
    ),
    TaskDefinition(
        "mrpc",
        {"0": "the news sentences differ in meaning", "1": "the news sentences mean the same"},
        texts=("s1", "s2"),
        prompt="First: {s1}\nSecond: {s2}\nDo the two news sentences mean the same?",
        kind="sentence pairs",
    ),
    TaskDefinition(
        "sick_para",
        {"0": "two different scenes", "1": "the same scene twice"},
        texts=("s1", "s2"),
        prompt="First: {s1}\nSecond: {s2}\nDo the two sentences describe the same scene?",
        kind="sentence pairs",
    ),
)
