"""Losses whose classes are the other examples of the batch."""

import torch
import torch.nn.functional as F

from .corpus import left_alone, real, rewritten

SIZE = 16
BATCH = 24


def embeddings(count=BATCH):
    return real(count, SIZE)


@rewritten(embeddings(), embeddings(), real())
def clip(image, text, logit_scale):
    """The same logits by row and by column."""
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = logit_scale.exp() * image @ text.t()
    target = torch.arange(BATCH)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


@rewritten(embeddings(), embeddings(), real())
def open_clip(image, text, logit_scale):
    """open_clip: one product for each direction."""
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    per_image = logit_scale.exp() * image @ text.T
    per_text = logit_scale.exp() * text @ image.T
    target = torch.arange(BATCH, dtype=torch.long)
    return (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2


@rewritten(embeddings(), embeddings())
def multiple_negatives_ranking(anchors, positives):
    """sentence-transformers: cosine similarities times 20."""
    scores = torch.mm(
        F.normalize(anchors, p=2, dim=1), F.normalize(positives, p=2, dim=1).transpose(0, 1)
    )
    return F.cross_entropy(scores * 20.0, torch.arange(scores.size(0)))


@rewritten(embeddings(8), embeddings(40))
def dpr(queries, contexts):
    """DPR: log-softmax and nll_loss over positives and hard negatives; accuracy beside it."""
    scores = torch.matmul(queries, torch.transpose(contexts, 0, 1))
    softmax_scores = F.log_softmax(scores, dim=1)
    positive = torch.arange(8) * 5
    loss = F.nll_loss(softmax_scores, positive, reduction="mean")
    _, best = torch.max(softmax_scores, 1)
    return loss, (best == positive).sum()


@rewritten(embeddings())
def simclr(z):
    """NT-Xent: each row's similarity to itself is masked out."""
    z = F.normalize(z, dim=1)
    similarity = z @ z.T / 0.5
    similarity = similarity.masked_fill(torch.eye(BATCH, dtype=torch.bool), -1e9)
    target = (torch.arange(BATCH) + BATCH // 2) % BATCH
    return F.cross_entropy(similarity, target)


def similarity(first, second):
    """sentence-transformers: each call normalises both sides."""
    first, second = F.normalize(first, p=2, dim=1), F.normalize(second, p=2, dim=1)
    return torch.mm(first, second.transpose(0, 1))


@rewritten(embeddings(), embeddings(), stored=1)
def multiple_negatives_ranking_of_one_column(anchors, positives):
    """sentence-transformers: scores of one column of texts, joined all the same."""
    scores = torch.cat([similarity(anchors, each) for each in [positives]], dim=1) * 20.0
    return F.cross_entropy(scores, torch.arange(anchors.size(0), device=scores.device))


@rewritten(embeddings(), embeddings(), embeddings(), real(), stored=1)
def multiple_negatives_ranking_with_hard_negatives(anchors, positives, negatives, scale):
    """Scores of several columns of texts, each scaled before they are joined."""
    columns = [similarity(anchors, each) * scale.exp() for each in (positives, negatives)]
    return F.cross_entropy(torch.cat(columns, dim=1), torch.arange(BATCH))


@rewritten(embeddings(), embeddings(), real(SIZE, 32, grad=False), stored=1)
def moco(q, k, queue):
    """A positive of its own for each row, negatives from a queue."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1).detach()
    positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", [q, queue.clone().detach()])
    logits = torch.cat([positive, negative], dim=1)
    logits /= 0.07
    return F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))


@rewritten(embeddings(), embeddings(), real(SIZE, SIZE), real(32, SIZE), stored=1)
def info_nce_with_a_head(x, other, head, negatives):
    """Both sides go through a head, and everything is trained."""
    query, key = F.normalize(F.linear(x, head), dim=-1), F.normalize(other @ head.T, dim=-1)
    positive = torch.sum(query * key, dim=1, keepdim=True)
    negative = query @ F.normalize(negatives, dim=-1).transpose(-2, -1)
    logits = torch.cat([positive, negative], dim=1)
    labels = torch.zeros(len(logits), dtype=torch.long, device=query.device)
    return F.cross_entropy(logits / 0.1, labels)


@left_alone(None, embeddings(), embeddings(), real(), real())
def siglip(image, text, logit_scale, logit_bias):
    """Every pair on its own: a sigmoid, no softmax."""
    logits = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    logits = logits * logit_scale.exp() + logit_bias
    signs = 2 * torch.eye(BATCH) - torch.ones(BATCH, BATCH)
    return -F.logsigmoid(signs * logits).sum() / BATCH


@rewritten(embeddings(), embeddings())
def contrastive_predictive_coding(prediction, encoded):
    """CPC: the diagonal of a log-softmax."""
    scores = encoded @ prediction.T
    return -F.log_softmax(scores, dim=-1).diagonal().mean()
