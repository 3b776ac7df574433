"""Task embeddings, similarities between tasks, and the ranking of experts."""

from pituning.similarity.embedding import TaskEmbedding, embed_task
from pituning.similarity.select import Ranking, rank_experts

__all__ = ["Ranking", "TaskEmbedding", "embed_task", "rank_experts"]
