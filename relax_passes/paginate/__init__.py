"""From a stateless full-sequence model to functions over a paged KV cache."""

from relax_passes.paginate.pass_ import PaginateAttention
from relax_passes.paginate.tokenwise import PaginateError

__all__ = ["PaginateAttention", "PaginateError"]
