"""The quantizers: one class a kind, which is its parameters. All else is in their base."""

from __future__ import annotations

from typing import Any

from vqrs._base import Quantizer

__all__ = [
    "AdditiveQuantizer",
    "DeduplicatingQuantizer",
    "LowRankQuantizer",
    "OptimizedProductQuantizer",
    "ProductQuantizer",
    "ProductResidualQuantizer",
    "ResidualQuantizer",
    "RotatedQuantizer",
    "ScalarQuantizer",
    "SparseQuantizer",
    "TreeQuantizer",
    "TrellisQuantizer",
    "VectorQuantizer",
]


class VectorQuantizer(Quantizer):
    """Each row becomes the nearest of ``n_clusters`` centroids found by k-means.

    Parameters
    ----------
    n_clusters : int, default=256
        Number of centroids. A row's code takes ⌈log₂ n_clusters⌉ bits, rounded up to whole bytes.
    max_iter : int, default=25
        Most iterations of k-means.
    tol : float, default=1e-4
        k-means stops when its centroids move by less than this fraction of the variance.
    codebook_dtype : {"float16", "bfloat16", "float32", "int8"}, default="float16"
        How the centroids are stored; ``int8`` has a scale for each codebook.
    center : bool, default=False
        Whether the mean row is taken off first; the table keeps it.
    rotation : {None, "random", "dense", "pca", "learned", "auto"}, default=None
        How rows are turned before they are coded: at random from a seed, at random by a stored matrix, to principal
        components, by what suits this quantizer best ("product" learns it), or as its other parameters suggest.
    rotation_dtype : {"float16", "int8", "float32"}, default="float16"
        How a matrix of the rotation is stored.
    residual : quantizer or None, default=None
        Codes what this one leaves over: a row is then the sum of both. Its own random state does not count.
    random_state : int, RandomState, Generator or None, default=None
        Draws the first centroids; an int repeats them.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    verbose : int, default=0
        1 prints progress.

    Attributes
    ----------
    codebooks_ : list of one ndarray of shape (n_clusters, n_features_in_), float32
        The centroids, as decoded.
    row_bytes_ : int
        Bytes of a row's code.
    n_iter_ : int
        Iterations of k-means.
    relative_error_ : float
        ‖X − X̂‖² / ‖X‖² of the rows that were fitted.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.

    See Also
    --------
    KMeans : The clustering itself, with labels and distances.
    ProductQuantizer : Splits the columns, for far more distinct rows at the same size of codebook.

    References
    ----------
    S. Lloyd, "Least squares quantization in PCM", 1982. D. Arthur, S. Vassilvitskii, "k-means++", 2007.

    Examples
    --------
    >>> import numpy as np
    >>> from vqrs import VectorQuantizer
    >>> x = np.array([[0, 0], [0, 1], [8, 8], [8, 9]], dtype=np.float32)
    >>> quantizer = VectorQuantizer(n_clusters=2, random_state=0).fit(x)
    >>> codes = quantizer.transform(x)
    >>> codes.shape, codes.dtype
    ((4, 1), dtype('uint8'))
    >>> quantizer.inverse_transform(codes)
    array([[0. , 0.5],
           [0. , 0.5],
           [8. , 8.5],
           [8. , 8.5]], dtype=float32)
    """

    _kind = "kmeans"

    def __init__(
        self,
        n_clusters: int = 256,
        *,
        max_iter: int = 25,
        tol: float = 1e-4,
        codebook_dtype: str = "float16",
        center: bool = False,
        rotation: str | None = None,
        rotation_dtype: str = "float16",
        residual: Quantizer | None = None,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.max_iter = max_iter
        self.tol = tol
        self.codebook_dtype = codebook_dtype
        self.center = center
        self.rotation = rotation
        self.rotation_dtype = rotation_dtype
        self.residual = residual
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose


class ProductQuantizer(Quantizer):
    """Cuts rows into ``n_subvectors`` pieces; each piece becomes the nearest of 2^n_bits centroids of its own.

    Where the number of features is not divisible by ``n_subvectors``, the first pieces are one column wider.

    Parameters
    ----------
    n_subvectors : int, default=8
        Number of pieces.
    n_bits : int, default=8
        Bits of a piece's code, 1 to 16.
    max_iter : int, default=25
        Most iterations of each k-means.
    tol : float, default=1e-4
        k-means stops when its centroids move by less than this fraction of the variance.
    codebook_dtype : {"float16", "bfloat16", "float32", "int8"}, default="float16"
        How the centroids are stored; ``int8`` has a scale for each codebook.
    center : bool, default=False
        Whether the mean row is taken off first; the table keeps it.
    rotation : {None, "random", "dense", "pca", "learned", "auto"}, default=None
        How rows are turned before they are coded: at random from a seed, at random by a stored matrix, to principal
        components, by what suits this quantizer best ("product" learns it), or as its other parameters suggest.
    rotation_dtype : {"float16", "int8", "float32"}, default="float16"
        How a matrix of the rotation is stored.
    residual : quantizer or None, default=None
        Codes what this one leaves over: a row is then the sum of both. Its own random state does not count.
    random_state : int, RandomState, Generator or None, default=None
        Draws the first centroids; an int repeats them.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    verbose : int, default=0
        1 prints progress.

    Attributes
    ----------
    codebooks_ : list of n_subvectors ndarrays of shape (2**n_bits, width), float32
        The centroids of each piece, as decoded.
    row_bytes_ : int
        Bytes of a row's code.
    n_iter_ : int
        Iterations of the longest k-means.
    relative_error_ : float
        ‖X − X̂‖² / ‖X‖² of the rows that were fitted.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.

    See Also
    --------
    ResidualQuantizer : Whole rows in stages: smaller error at the same bytes, slower to learn and encode.

    References
    ----------
    H. Jégou, M. Douze, C. Schmid, "Product quantization for nearest neighbor search", 2011.

    Examples
    --------
    >>> import numpy as np
    >>> from vqrs import ProductQuantizer
    >>> x = np.random.default_rng(0).standard_normal((200, 6), dtype=np.float32)
    >>> quantizer = ProductQuantizer(n_subvectors=3, n_bits=4, random_state=0)
    >>> codes = quantizer.fit_transform(x)
    >>> codes.shape  # three pieces of four bits: 12 bits, two bytes
    (200, 2)
    >>> [book.shape for book in quantizer.codebooks_]
    [(16, 2), (16, 2), (16, 2)]
    >>> quantizer.inverse_transform(codes).shape
    (200, 6)
    """

    _kind = "product"

    def __init__(
        self,
        n_subvectors: int = 8,
        n_bits: int = 8,
        *,
        max_iter: int = 25,
        tol: float = 1e-4,
        codebook_dtype: str = "float16",
        center: bool = False,
        rotation: str | None = None,
        rotation_dtype: str = "float16",
        residual: Quantizer | None = None,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_subvectors = n_subvectors
        self.n_bits = n_bits
        self.max_iter = max_iter
        self.tol = tol
        self.codebook_dtype = codebook_dtype
        self.center = center
        self.rotation = rotation
        self.rotation_dtype = rotation_dtype
        self.residual = residual
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose


class OptimizedProductQuantizer(Quantizer):
    """Product codes of rows that were turned as suits them best: ``ProductQuantizer(center=True, rotation="learned")``.

    Rounds of codes for the rotation and of the rotation for the codes, from the principal components shared out among
    the pieces. It helps where columns depend on each other, and costs the bytes of the rotation.

    Parameters
    ----------
    n_subvectors : int, default=8
        Number of pieces.
    n_bits : int, default=8
        Bits of a piece's code, 1 to 16.
    max_iter : int, default=25
        Most iterations of each k-means.
    tol : float, default=1e-4
        k-means stops when its centroids move by less than this fraction of the variance.
    codebook_dtype : {"float16", "bfloat16", "float32"}, default="float16"
        How the centroids are stored.
    center : bool, default=True
        Whether the mean row is taken off first; the table keeps it.
    rotation : {None, "random", "dense", "pca", "learned", "auto"}, default="learned"
        How rows are turned before they are coded: at random from a seed, at random by a stored matrix, to principal
        components, by what suits this quantizer best ("product" learns it), or as its other parameters suggest.
    rotation_dtype : {"float16", "int8", "float32"}, default="float16"
        How a matrix of the rotation is stored.
    residual : quantizer or None, default=None
        Codes what this one leaves over: a row is then the sum of both. Its own random state does not count.
    random_state : int, RandomState, Generator or None, default=None
        Draws the first centroids; an int repeats them.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    verbose : int, default=0
        1 prints progress.

    Attributes
    ----------
    codebooks_ : list of n_subvectors ndarrays of shape (2**n_bits, width), float32
        The centroids of each piece, as decoded.
    row_bytes_ : int
        Bytes of a row's code.
    n_iter_ : int
        Iterations of the longest k-means.
    relative_error_ : float
        ‖X − X̂‖² / ‖X‖² of the rows that were fitted.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.

    See Also
    --------
    ProductQuantizer : The same without a rotation: its table is smaller, its lookups are faster.

    References
    ----------
    T. Ge, K. He, Q. Ke, J. Sun, "Optimized product quantization", 2013.

    Examples
    --------
    >>> import numpy as np
    >>> from vqrs import OptimizedProductQuantizer, ProductQuantizer
    >>> generator = np.random.default_rng(0)
    >>> x = generator.standard_normal((2000, 8)) * 2.0 ** -np.arange(8)
    >>> x = x @ np.linalg.qr(generator.standard_normal((8, 8)))[0]
    >>> turned = OptimizedProductQuantizer(n_subvectors=4, n_bits=4, random_state=0).fit(x)
    >>> plain = ProductQuantizer(n_subvectors=4, n_bits=4, random_state=0).fit(x)
    >>> bool(turned.relative_error_ < 0.8 * plain.relative_error_)
    True
    """

    _kind = "optimized-product"

    def __init__(
        self,
        n_subvectors: int = 8,
        n_bits: int = 8,
        *,
        max_iter: int = 25,
        tol: float = 1e-4,
        codebook_dtype: str = "float16",
        center: bool = True,
        rotation: str | None = "learned",
        rotation_dtype: str = "float16",
        residual: Quantizer | None = None,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_subvectors = n_subvectors
        self.n_bits = n_bits
        self.max_iter = max_iter
        self.tol = tol
        self.codebook_dtype = codebook_dtype
        self.center = center
        self.rotation = rotation
        self.rotation_dtype = rotation_dtype
        self.residual = residual
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose


class ResidualQuantizer(Quantizer):
    """Each row becomes a sum of ``n_stages`` entries, one a codebook, found stage by stage with a beam search.

    Every stage learns from what the stages before it left; then all codebooks are refined together by least squares.

    Parameters
    ----------
    n_stages : int, default=8
        Number of codebooks.
    n_bits : int, default=8
        Bits of a stage's code: a codebook has 2^n_bits entries. 1 to 16.
    beam_width : int, default=8
        Partial sums that encoding keeps for each row. 1 is greedy.
    n_refinements : int, default=5
        Rounds of encoding all rows and solving for all codebooks at once.
    max_iter : int, default=25
        Most iterations of each stage's k-means.
    tol : float, default=1e-4
        k-means stops when its centroids move by less than this fraction of the variance.
    codebook_dtype : {"float16", "bfloat16", "float32", "int8"}, default="float16"
        How the entries are stored; ``int8`` has a scale for each codebook.
    center : bool, default=False
        Whether the mean row is taken off first; the table keeps it.
    rotation : {None, "random", "dense", "pca", "learned", "auto"}, default=None
        How rows are turned before they are coded: at random from a seed, at random by a stored matrix, to principal
        components, by what suits this quantizer best ("product" learns it), or as its other parameters suggest.
    rotation_dtype : {"float16", "int8", "float32"}, default="float16"
        How a matrix of the rotation is stored.
    residual : quantizer or None, default=None
        Codes what this one leaves over: a row is then the sum of both. Its own random state does not count.
    random_state : int, RandomState, Generator or None, default=None
        Draws the first centroids; an int repeats them.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    verbose : int, default=0
        1 prints progress.

    Attributes
    ----------
    codebooks_ : list of n_stages ndarrays of shape (2**n_bits, n_features_in_), float32
        The entries of each stage, as decoded.
    row_bytes_ : int
        Bytes of a row's code.
    n_iter_ : int
        Iterations of the longest k-means.
    relative_error_ : float
        ‖X − X̂‖² / ‖X‖² of the rows that were fitted.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.

    See Also
    --------
    ProductQuantizer : Much faster to learn and encode.
    AdditiveQuantizer : Smaller error at the same bytes, slower to learn and encode.

    References
    ----------
    Y. Chen, T. Guan, C. Wang, "Approximate nearest neighbor search by residual vector quantization", 2010.
    A. Babenko, V. Lempitsky, "Additive quantization for extreme vector compression", 2014, for the least squares.

    Examples
    --------
    >>> import numpy as np
    >>> from vqrs import ResidualQuantizer
    >>> x = np.random.default_rng(0).standard_normal((200, 6), dtype=np.float32)
    >>> quantizer = ResidualQuantizer(n_stages=4, n_bits=4, random_state=0).fit(x)
    >>> quantizer.transform(x).shape  # four stages of four bits: two bytes
    (200, 2)
    >>> quantizer.codebooks_[0].shape
    (16, 6)
    """

    _kind = "residual"

    def __init__(
        self,
        n_stages: int = 8,
        n_bits: int = 8,
        beam_width: int = 8,
        *,
        n_refinements: int = 5,
        max_iter: int = 25,
        tol: float = 1e-4,
        codebook_dtype: str = "float16",
        center: bool = False,
        rotation: str | None = None,
        rotation_dtype: str = "float16",
        residual: Quantizer | None = None,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_stages = n_stages
        self.n_bits = n_bits
        self.beam_width = beam_width
        self.n_refinements = n_refinements
        self.max_iter = max_iter
        self.tol = tol
        self.codebook_dtype = codebook_dtype
        self.center = center
        self.rotation = rotation
        self.rotation_dtype = rotation_dtype
        self.residual = residual
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose


class ProductResidualQuantizer(Quantizer):
    """Cuts rows into ``n_subvectors`` pieces; each piece becomes a sum of ``n_stages`` entries, one a codebook.

    One piece makes a :class:`ResidualQuantizer`, one stage a :class:`ProductQuantizer`. The codebooks of all pieces
    together are as large as those of a residual quantizer with ``n_stages`` stages, while codes are ``n_subvectors``
    times as long: the choice where rows are few or wide.

    Parameters
    ----------
    n_subvectors : int, default=4
        Number of pieces. Where the number of features is not divisible by it, the first pieces are one column wider.
    n_stages : int, default=2
        Number of codebooks of a piece.
    n_bits : int, default=8
        Bits of a stage's code: a codebook has 2^n_bits entries. 1 to 16.
    beam_width : int, default=8
        Partial sums that encoding keeps for each piece of a row. 1 is greedy.
    n_refinements : int, default=5
        Rounds of encoding all rows and solving for all codebooks of a piece at once; none where there is one stage.
    max_iter : int, default=25
        Most iterations of each stage's k-means.
    tol : float, default=1e-4
        k-means stops when its centroids move by less than this fraction of the variance.
    codebook_dtype : {"float16", "bfloat16", "float32"}, default="float16"
        How the entries are stored.
    center : bool, default=False
        Whether the mean row is taken off first; the table keeps it.
    rotation : {None, "random", "dense", "pca", "learned", "auto"}, default=None
        How rows are turned before they are coded: at random from a seed, at random by a stored matrix, to principal
        components, by what suits this quantizer best ("product" learns it), or as its other parameters suggest.
    rotation_dtype : {"float16", "int8", "float32"}, default="float16"
        How a matrix of the rotation is stored.
    residual : quantizer or None, default=None
        Codes what this one leaves over: a row is then the sum of both. Its own random state does not count.
    random_state : int, RandomState, Generator or None, default=None
        Draws the first centroids; an int repeats them.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    verbose : int, default=0
        1 prints progress.

    Attributes
    ----------
    codebooks_ : list of n_subvectors * n_stages ndarrays of shape (2**n_bits, width), float32
        The entries of each stage of the first piece, then of the second one, ..., as decoded.
    row_bytes_ : int
        Bytes of a row's code.
    n_iter_ : int
        Iterations of the longest k-means.
    relative_error_ : float
        ‖X − X̂‖² / ‖X‖² of the rows that were fitted.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.

    See Also
    --------
    ProductQuantizer : Much faster to learn and encode.
    ResidualQuantizer : Whole rows in stages, for large tables.

    References
    ----------
    H. Jégou, M. Douze, C. Schmid, "Product quantization for nearest neighbor search", 2011.
    Y. Chen, T. Guan, C. Wang, "Approximate nearest neighbor search by residual vector quantization", 2010.

    Examples
    --------
    >>> import numpy as np
    >>> from vqrs import ProductResidualQuantizer
    >>> x = np.random.default_rng(0).standard_normal((200, 6), dtype=np.float32)
    >>> quantizer = ProductResidualQuantizer(n_subvectors=2, n_stages=3, n_bits=4, random_state=0).fit(x)
    >>> quantizer.transform(x).shape  # two pieces in three stages of four bits: three bytes
    (200, 3)
    >>> len(quantizer.codebooks_), quantizer.codebooks_[0].shape
    (6, (16, 3))
    """

    _kind = "product-residual"

    def __init__(
        self,
        n_subvectors: int = 4,
        n_stages: int = 2,
        n_bits: int = 8,
        beam_width: int = 8,
        *,
        n_refinements: int = 5,
        max_iter: int = 25,
        tol: float = 1e-4,
        codebook_dtype: str = "float16",
        center: bool = False,
        rotation: str | None = None,
        rotation_dtype: str = "float16",
        residual: Quantizer | None = None,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_subvectors = n_subvectors
        self.n_stages = n_stages
        self.n_bits = n_bits
        self.beam_width = beam_width
        self.n_refinements = n_refinements
        self.max_iter = max_iter
        self.tol = tol
        self.codebook_dtype = codebook_dtype
        self.center = center
        self.rotation = rotation
        self.rotation_dtype = rotation_dtype
        self.residual = residual
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose


class AdditiveQuantizer(Quantizer):
    """Each row becomes a sum of ``n_codebooks`` entries, one a codebook, that a local search chooses together.

    A row is stored and read as with :class:`ResidualQuantizer`, which is also where learning starts. Then come rounds
    of least squares for all codebooks and of local search for all codes, under noise that falls to nothing, so that no
    codebook stays the coarse one. Learning and encoding take several times as long, and the error is smaller.

    Parameters
    ----------
    n_codebooks : int, default=8
        Number of codebooks.
    n_bits : int, default=8
        Bits of an entry's number: a codebook has 2^n_bits entries. 1 to 16.
    beam_width : int, default=8
        Partial sums kept for each row by the search that finds the codes to start from.
    n_rounds : int, default=25
        Rounds of least squares and local search. 0 leaves the codebooks to the start, and only searches codes.
    n_searches : int, default=16
        Times that the search for a row's final code leaves a minimum for another.
    n_perturbations : int, default=2
        Entries that are replaced by random ones to leave a minimum.
    noise : float, default=0.55
        Size of the first round's noise on a sum of entries, over that of what the start leaves of rows.
    max_iter : int, default=25
        Most iterations of each k-means of the start.
    tol : float, default=1e-4
        k-means stops when its centroids move by less than this fraction of the variance.
    codebook_dtype : {"float16", "bfloat16", "float32"}, default="float16"
        How the entries are stored.
    center : bool, default=False
        Whether the mean row is taken off first; the table keeps it.
    rotation : {None, "random", "dense", "pca", "learned", "auto"}, default=None
        How rows are turned before they are coded: at random from a seed, at random by a stored matrix, to principal
        components, by what suits this quantizer best ("product" learns it), or as its other parameters suggest.
    rotation_dtype : {"float16", "int8", "float32"}, default="float16"
        How a matrix of the rotation is stored.
    residual : quantizer or None, default=None
        Codes what this one leaves over: a row is then the sum of both. Its own random state does not count.
    random_state : int, RandomState, Generator or None, default=None
        Draws the first centroids, noise and perturbations; an int repeats them.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    verbose : int, default=0
        1 prints progress.

    Attributes
    ----------
    codebooks_ : list of n_codebooks ndarrays of shape (2**n_bits, n_features_in_), float32
        The entries of each codebook, as decoded.
    row_bytes_ : int
        Bytes of a row's code.
    n_iter_ : int
        Iterations of the longest k-means.
    relative_error_ : float
        ‖X − X̂‖² / ‖X‖² of the rows that were fitted.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.

    See Also
    --------
    ResidualQuantizer : The start alone, faster to learn and to encode.

    References
    ----------
    J. Martinez, S. Zakhmi, H. H. Hoos, J. J. Little, "LSQ++: Lower running time and higher recall in multi-codebook
    quantization", 2018.

    Examples
    --------
    >>> import numpy as np
    >>> from vqrs import AdditiveQuantizer
    >>> x = np.random.default_rng(0).standard_normal((200, 6), dtype=np.float32)
    >>> quantizer = AdditiveQuantizer(n_codebooks=4, n_bits=4, random_state=0).fit(x)
    >>> quantizer.transform(x).shape  # four entries of four bits: two bytes
    (200, 2)
    >>> quantizer.codebooks_[0].shape
    (16, 6)
    """

    _kind = "additive"

    def __init__(
        self,
        n_codebooks: int = 8,
        n_bits: int = 8,
        *,
        beam_width: int = 8,
        n_rounds: int = 25,
        n_searches: int = 16,
        n_perturbations: int = 2,
        noise: float = 0.55,
        max_iter: int = 25,
        tol: float = 1e-4,
        codebook_dtype: str = "float16",
        center: bool = False,
        rotation: str | None = None,
        rotation_dtype: str = "float16",
        residual: Quantizer | None = None,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_codebooks = n_codebooks
        self.n_bits = n_bits
        self.beam_width = beam_width
        self.n_rounds = n_rounds
        self.n_searches = n_searches
        self.n_perturbations = n_perturbations
        self.noise = noise
        self.max_iter = max_iter
        self.tol = tol
        self.codebook_dtype = codebook_dtype
        self.center = center
        self.rotation = rotation
        self.rotation_dtype = rotation_dtype
        self.residual = residual
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose


class TreeQuantizer(Quantizer):
    """Each row becomes a leaf of a tree of centroids: k-means in each cluster of a k-means, and so on.

    Learning and encoding compare a row with the children of a few nodes rather than with all leaves, so that far more
    centroids are within reach than with :class:`VectorQuantizer`. Cut off at any level, a code names a node of the
    tree.

    Parameters
    ----------
    branching : int, default=16
        Children of a node.
    depth : int, default=2
        Levels below the root: there are branching^depth leaves, all of which are stored.
    beam_width : int, default=4
        Nodes of a level that encoding follows. branching^(depth - 1) finds the nearest leaf.
    max_iter : int, default=25
        Most iterations of each k-means.
    tol : float, default=1e-4
        k-means stops when its centroids move by less than this fraction of the variance.
    codebook_dtype : {"float16", "bfloat16", "float32"}, default="float16"
        How the centroids are stored.
    center : bool, default=False
        Whether the mean row is taken off first; the table keeps it.
    rotation : {None, "random", "dense", "pca", "learned", "auto"}, default=None
        How rows are turned before they are coded: at random from a seed, at random by a stored matrix, to principal
        components, by what suits this quantizer best ("product" learns it), or as its other parameters suggest.
    rotation_dtype : {"float16", "int8", "float32"}, default="float16"
        How a matrix of the rotation is stored.
    residual : quantizer or None, default=None
        Codes what this one leaves over: a row is then the sum of both. Its own random state does not count.
    random_state : int, RandomState, Generator or None, default=None
        Draws the first centroids; an int repeats them.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    verbose : int, default=0
        1 prints progress.

    Attributes
    ----------
    codebooks_ : list of one ndarray of shape (branching**depth, n_features_in_), float32
        The leaves, as decoded: those of the root's first child, then those of its second one, ...
    row_bytes_ : int
        Bytes of a row's code.
    n_iter_ : int
        Iterations of the longest k-means.
    relative_error_ : float
        ‖X − X̂‖² / ‖X‖² of the rows that were fitted.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.

    See Also
    --------
    VectorQuantizer : One level, compared as a whole: the smaller error for the same number of centroids.

    References
    ----------
    A. Buzo, A. Gray, R. Gray, J. Markel, "Speech coding based upon vector quantization", 1980.

    Examples
    --------
    >>> import numpy as np
    >>> from vqrs import TreeQuantizer
    >>> x = np.array([[0, 0], [0, 1], [8, 8], [8, 9]], dtype=np.float32)
    >>> quantizer = TreeQuantizer(branching=2, depth=2, random_state=0).fit(x)
    >>> codes = quantizer.transform(x)
    >>> codes.shape, codes.dtype  # two levels of one bit
    ((4, 1), dtype('uint8'))
    >>> quantizer.inverse_transform(codes)
    array([[0., 0.],
           [0., 1.],
           [8., 8.],
           [8., 9.]], dtype=float32)
    """

    _kind = "tree"

    def __init__(
        self,
        branching: int = 16,
        depth: int = 2,
        *,
        beam_width: int = 4,
        max_iter: int = 25,
        tol: float = 1e-4,
        codebook_dtype: str = "float16",
        center: bool = False,
        rotation: str | None = None,
        rotation_dtype: str = "float16",
        residual: Quantizer | None = None,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.branching = branching
        self.depth = depth
        self.beam_width = beam_width
        self.max_iter = max_iter
        self.tol = tol
        self.codebook_dtype = codebook_dtype
        self.center = center
        self.rotation = rotation
        self.rotation_dtype = rotation_dtype
        self.residual = residual
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose


class ScalarQuantizer(Quantizer):
    """Each value becomes a small number: a shorter float, or an integer level between two ends.

    Parameters
    ----------
    dtype : str, default="int8"
        What a value is stored as: "float16", "bfloat16", "float8", "int8", "int6", "int5", "int4", "float4", "nf4",
        "free4", "int3" or "int2". The number is that of its bits. Integers are levels at even distances. ``float8``
        (four bits of exponent, three of mantissa), ``float4`` (two and one) and ``nf4`` (levels that normal values use
        equally often) are times a scale, without a lower end. ``free4`` is one of sixteen float16 levels that are the
        best for the row or block, and stand in it: 32 bytes, worth it from about 64 values on.
    granularity : {"row", "column", "block"}, default="row"
        What shares one pair of ends: a row, a column, or ``block_size`` consecutive values of a row. Ends of rows and
        blocks are stored in the row, as float16. 16-bit floats need none.
    block_size : int, default=64
        Values in a block, if ``granularity="block"``.
    clip : {"mse", "minmax"}, default="mse"
        Ends that make the squared error smallest, or the least and greatest value. Of no effect above 4 bits.
    symmetric : bool, default=False
        Whether the levels lie evenly around zero, which leaves the lower end out of the row.
    scale_dtype : {"float16", "float8"}, default="float16"
        How rows and blocks store scales: ``float8`` takes one byte, without a sign, and keeps them to 3 percent. It
        needs ``symmetric=True`` or a dtype that is.
    center : bool, default=False
        Whether the mean row is taken off first; the table keeps it.
    rotation : {None, "random", "dense", "pca", "learned", "auto"}, default=None
        How rows are turned before they are coded: at random from a seed, at random by a stored matrix, to principal
        components, by what suits this quantizer best ("product" learns it), or as its other parameters suggest.
    rotation_dtype : {"float16", "int8", "float32"}, default="float16"
        How a matrix of the rotation is stored.
    residual : quantizer or None, default=None
        Codes what this one leaves over: a row is then the sum of both. Its own random state does not count.
    random_state : int, RandomState, Generator or None, default=None
        Draws a random rotation; an int repeats it.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    verbose : int, default=0
        1 prints progress.

    Attributes
    ----------
    scale_ : ndarray of shape (n_features_in_,), float32, or None
        Step between the levels of each column, if ``granularity="column"``; rows keep their own otherwise.
    offset_ : ndarray of shape (n_features_in_,), float32, or None
        Value of the lowest level of each column, if ``granularity="column"``.
    row_bytes_ : int
        Bytes of a row's code, its scales included.
    n_iter_ : int
        Rounds of the fit.
    relative_error_ : float
        ‖X − X̂‖² / ‖X‖² of the rows that were fitted.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.

    References
    ----------
    H. Guan et al., "Post-training 4-bit quantization on embedding tables", 2019, for ends that are chosen by error, and
    levels of a row's own. T. Dettmers et al., "QLoRA", 2023, for nf4.

    Examples
    --------
    >>> import numpy as np
    >>> from vqrs import ScalarQuantizer
    >>> x = np.array([[0, 1, 2, 3], [0, 10, 20, 30]], dtype=np.float32)
    >>> quantizer = ScalarQuantizer("int2").fit(x)
    >>> codes = quantizer.transform(x)
    >>> codes.shape  # four values of two bits, a float16 scale and a float16 offset
    (2, 5)
    >>> quantizer.inverse_transform(codes)
    array([[ 0.,  1.,  2.,  3.],
           [ 0., 10., 20., 30.]], dtype=float32)
    """

    _kind = "scalar"

    def __init__(
        self,
        dtype: str = "int8",
        granularity: str = "row",
        *,
        block_size: int = 64,
        clip: str = "mse",
        symmetric: bool = False,
        scale_dtype: str = "float16",
        center: bool = False,
        rotation: str | None = None,
        rotation_dtype: str = "float16",
        residual: Quantizer | None = None,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.dtype = dtype
        self.granularity = granularity
        self.block_size = block_size
        self.clip = clip
        self.symmetric = symmetric
        self.scale_dtype = scale_dtype
        self.center = center
        self.rotation = rotation
        self.rotation_dtype = rotation_dtype
        self.residual = residual
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose


class RotatedQuantizer(Quantizer):
    """Rows are rotated at random, and each value becomes one of 2^n_bits levels that suit the normal distribution.

    A rotation makes the values of any row nearly normal, so that the error is known before: 0.363, 0.117, 0.0345 or
    0.0095 of the squared norm at 1, 2, 3 or 4 bits, and a little less where rows are short. Nothing is trained.

    Parameters
    ----------
    n_bits : int, default=4
        Bits of a value, 1 to 8.
    estimator : {"squares", "unbiased"}, default="squares"
        What a row's scale is chosen for: the least squared error, or inner products with decoded rows that are right on
        average over all rotations. The latter are a little longer and have the larger error.
    scale_dtype : {"float16", "float8"}, default="float16"
        How rows store their scale: ``float8`` takes one byte and keeps it to 3 percent, which is better for short rows.
    center : bool, default=True
        Whether the mean row is taken off first; the table keeps it.
    rotation : {None, "random", "dense", "pca", "learned", "auto"}, default="random"
        How rows are turned before they are coded: at random from a seed, at random by a stored matrix, to principal
        components, by what suits this quantizer best ("product" learns it), or as its other parameters suggest.
    rotation_dtype : {"float16", "int8", "float32"}, default="float16"
        How a matrix of the rotation is stored.
    residual : quantizer or None, default=None
        Codes what this one leaves over: a row is then the sum of both. Its own random state does not count.
    random_state : int, RandomState, Generator or None, default=None
        Draws the rotation; an int repeats it.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    verbose : int, default=0
        1 prints progress.

    Attributes
    ----------
    row_bytes_ : int
        Bytes of a row's code, its scale included.
    n_iter_ : int
        Rounds of the fit.
    relative_error_ : float
        ‖X − X̂‖² / ‖X‖² of the rows that were fitted.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.

    See Also
    --------
    ScalarQuantizer : Levels that follow each row's own values, without a rotation.

    References
    ----------
    A. Zandieh et al., "TurboQuant: online vector quantization with near-optimal distortion rate", 2025. J. Gao,
    C. Long, "RaBitQ: quantizing high-dimensional vectors with a theoretical error bound", 2024, for the unbiased scale.

    Examples
    --------
    >>> import numpy as np
    >>> from vqrs import RotatedQuantizer
    >>> x = np.random.default_rng(0).standard_normal((200, 64), dtype=np.float32)
    >>> quantizer = RotatedQuantizer(n_bits=2, random_state=0).fit(x)
    >>> quantizer.transform(x).shape  # 64 values of two bits and a float16 scale
    (200, 18)
    >>> print(f"{quantizer.relative_error_:.2f}")
    0.11
    """

    _kind = "rotated"

    def __init__(
        self,
        n_bits: int = 4,
        *,
        estimator: str = "squares",
        scale_dtype: str = "float16",
        center: bool = True,
        rotation: str | None = "random",
        rotation_dtype: str = "float16",
        residual: Quantizer | None = None,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_bits = n_bits
        self.estimator = estimator
        self.scale_dtype = scale_dtype
        self.center = center
        self.rotation = rotation
        self.rotation_dtype = rotation_dtype
        self.residual = residual
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose


class LowRankQuantizer(Quantizer):
    """The leading ``n_components`` principal components of the rows, each value a small number.

    Unquantized, no linear map of so few components has a smaller error. Components have scales of their own:
    ``granularity="column"``.

    Parameters
    ----------
    n_components : int, default=32
        Number of components.
    dtype : str, default="int8"
        What a value is stored as: see :class:`ScalarQuantizer`, as for the five parameters that follow.
    granularity : {"column", "row", "block"}, default="column"
        What shares one pair of ends.
    block_size : int, default=64
        Values in a block, if ``granularity="block"``.
    clip : {"mse", "minmax"}, default="mse"
        Ends that make the squared error smallest, or the least and greatest value.
    symmetric : bool, default=False
        Whether the levels lie evenly around zero.
    scale_dtype : {"float16", "float8"}, default="float16"
        How rows and blocks store scales.
    center : bool, default=True
        Whether the mean row is taken off first; the table keeps it.
    rotation : {None, "random", "dense", "pca", "learned", "auto"}, default="pca"
        How rows are turned before they are coded: at random from a seed, at random by a stored matrix, to principal
        components, by what suits this quantizer best ("product" learns it), or as its other parameters suggest.
    rotation_dtype : {"float16", "int8", "float32"}, default="float16"
        How a matrix of the rotation is stored.
    residual : quantizer or None, default=None
        Codes what this one leaves over: a row is then the sum of both. Its own random state does not count.
    random_state : int, RandomState, Generator or None, default=None
        Draws a random rotation; an int repeats it.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    verbose : int, default=0
        1 prints progress.

    Attributes
    ----------
    components_ : ndarray of shape (n_components, n_features_in_), float32
        The components as they are read, one a row.
    mean_ : ndarray of shape (n_features_in_,), float32
        The mean row.
    row_bytes_ : int
        Bytes of a row's code.
    n_iter_ : int
        Rounds of the fit.
    relative_error_ : float
        ‖X − X̂‖² / ‖X‖² of the rows that were fitted.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.

    References
    ----------
    C. Eckart, G. Young, "The approximation of one matrix by another of lower rank", 1936.

    Examples
    --------
    >>> import numpy as np
    >>> from vqrs import LowRankQuantizer
    >>> generator = np.random.default_rng(0)
    >>> x = generator.standard_normal((500, 3)) @ generator.standard_normal((3, 40))
    >>> quantizer = LowRankQuantizer(n_components=3).fit(x)
    >>> quantizer.row_bytes_, bool(quantizer.relative_error_ < 1e-3)
    (3, True)

    What it leaves over can be coded by another quantizer:

    >>> from vqrs import ScalarQuantizer
    >>> both = LowRankQuantizer(n_components=2, residual=ScalarQuantizer("int2")).fit(x)
    >>> both.row_bytes_  # two components, then two bits a value with a scale and an offset
    16
    """

    _kind = "low-rank"

    def __init__(
        self,
        n_components: int = 32,
        dtype: str = "int8",
        *,
        granularity: str = "column",
        block_size: int = 64,
        clip: str = "mse",
        symmetric: bool = False,
        scale_dtype: str = "float16",
        center: bool = True,
        rotation: str | None = "pca",
        rotation_dtype: str = "float16",
        residual: Quantizer | None = None,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_components = n_components
        self.dtype = dtype
        self.granularity = granularity
        self.block_size = block_size
        self.clip = clip
        self.symmetric = symmetric
        self.scale_dtype = scale_dtype
        self.center = center
        self.rotation = rotation
        self.rotation_dtype = rotation_dtype
        self.residual = residual
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose


class SparseQuantizer(Quantizer):
    """A row keeps its largest values, as many as every other row, and the rest become zero.

    Parameters
    ----------
    density : float, default=0.1
        Part of the values that is kept: round(density · d) of a row, at least one.
    dtype : {"float16", "float32", "int8"}, default="float16"
        What a value that is kept is stored as; ``int8`` has a float16 scale a row.
    center : bool, default=False
        Whether the mean row is taken off first; the table keeps it.
    rotation : {None, "random", "dense", "pca", "learned", "auto"}, default=None
        How rows are turned before they are coded: at random from a seed, at random by a stored matrix, to principal
        components, by what suits this quantizer best ("product" learns it), or as its other parameters suggest.
    rotation_dtype : {"float16", "int8", "float32"}, default="float16"
        How a matrix of the rotation is stored.
    residual : quantizer or None, default=None
        Codes what this one leaves over: a row is then the sum of both. Its own random state does not count.
    random_state : int, RandomState, Generator or None, default=None
        Draws a random rotation; an int repeats it.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    verbose : int, default=0
        1 prints progress.

    Attributes
    ----------
    row_bytes_ : int
        Bytes of a row's code.
    n_iter_ : int
        Rounds of the fit.
    relative_error_ : float
        ‖X − X̂‖² / ‖X‖² of the rows that were fitted.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.

    See Also
    --------
    ScalarQuantizer : Keeps all values in fewer bits, which has the smaller error unless most values are near zero.

    Examples
    --------
    >>> import numpy as np
    >>> from vqrs import SparseQuantizer
    >>> x = np.array([[0, 3, 0.5, -4], [1, 0, 0, 0.25]], dtype=np.float32)
    >>> quantizer = SparseQuantizer(density=0.5).fit(x)
    >>> codes = quantizer.transform(x)
    >>> codes.shape  # four columns are four bits, and two values are float16
    (2, 5)
    >>> quantizer.inverse_transform(codes)
    array([[ 0.  ,  3.  ,  0.  , -4.  ],
           [ 1.  ,  0.  ,  0.  ,  0.25]], dtype=float32)
    """

    _kind = "sparse"

    def __init__(
        self,
        density: float = 0.1,
        *,
        dtype: str = "float16",
        center: bool = False,
        rotation: str | None = None,
        rotation_dtype: str = "float16",
        residual: Quantizer | None = None,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.density = density
        self.dtype = dtype
        self.center = center
        self.rotation = rotation
        self.rotation_dtype = rotation_dtype
        self.residual = residual
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose


class DeduplicatingQuantizer(Quantizer):
    """Rows that occur more than once, or nearly so, are stored once.

    With the defaults nothing is lost: every row that was fitted comes back as it was. New rows become the nearest of
    the rows that are kept.

    Parameters
    ----------
    tolerance : float, default=0.0
        Rows whose values differ by this much at most are taken for equal. A row is only compared with rows that are
        kept, so that no value moves by more. Rows that are nearly equal are found by hashing: one in 10⁸ is missed.
    codebook_dtype : {"float32", "float16", "bfloat16", "int8"}, default="float32"
        How the rows are stored; all but ``float32`` round them.
    center : bool, default=False
        Whether the mean row is taken off first; the table keeps it.
    rotation : {None, "random", "dense", "pca", "learned", "auto"}, default=None
        How rows are turned before they are coded: at random from a seed, at random by a stored matrix, to principal
        components, by what suits this quantizer best ("product" learns it), or as its other parameters suggest.
    rotation_dtype : {"float16", "int8", "float32"}, default="float16"
        How a matrix of the rotation is stored.
    residual : quantizer or None, default=None
        Codes what this one leaves over: a row is then the sum of both. Its own random state does not count.
    random_state : int, RandomState, Generator or None, default=None
        Draws a random rotation; an int repeats it.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    verbose : int, default=0
        1 prints progress.

    Attributes
    ----------
    codebooks_ : list of one ndarray of shape (n_kept, n_features_in_), float32
        The rows that are kept, in the order in which they were met.
    row_bytes_ : int
        Bytes of a row's code.
    n_iter_ : int
        Rounds of the fit.
    relative_error_ : float
        ‖X − X̂‖² / ‖X‖² of the rows that were fitted.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.

    See Also
    --------
    VectorQuantizer : As many rows as are wanted, which need not be among those that were fitted.

    References
    ----------
    L. Zhou et al., "Serving deep learning models with deduplication from relational databases", 2022.

    Examples
    --------
    >>> import numpy as np
    >>> from vqrs import DeduplicatingQuantizer
    >>> x = np.array([[1, 2], [3, 4], [1, 2], [3, 4.01]], dtype=np.float32)
    >>> DeduplicatingQuantizer().fit(x).codebooks_[0].shape
    (3, 2)
    >>> quantizer = DeduplicatingQuantizer(tolerance=0.02).fit(x)
    >>> quantizer.inverse_transform(quantizer.transform(x))
    array([[1., 2.],
           [3., 4.],
           [1., 2.],
           [3., 4.]], dtype=float32)
    """

    _kind = "deduplicating"

    def __init__(
        self,
        tolerance: float = 0.0,
        *,
        codebook_dtype: str = "float32",
        center: bool = False,
        rotation: str | None = None,
        rotation_dtype: str = "float16",
        residual: Quantizer | None = None,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.tolerance = tolerance
        self.codebook_dtype = codebook_dtype
        self.center = center
        self.rotation = rotation
        self.rotation_dtype = rotation_dtype
        self.residual = residual
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose


class TrellisQuantizer(Quantizer):
    """A row becomes a circular stream of bits, found as a whole, of which each column reads a window.

    The windows of neighbours overlap, so that a few bits a value choose among thousands of levels: for normal values
    the error is within an eighth of the bound, with no codebook to learn or store. Rows are turned first, so that
    their values are nearly normal.

    Parameters
    ----------
    n_bits : float, default=2.0
        Bits a value, with all that a row stores: any number above 0, up to 8. Rows are whole bytes.
    state_bits : int, default=12
        Bits of a window, 4 to 16: each one more halves the speed of encoding. Rows of few bits have shorter windows.
    bit_allocation : {"even", "variance"}, default="even"
        Whether columns share the bits alike, or by their variance, which goes with principal components.
    scale_bits : int or None, default=None
        Bits of a row that tell its scale, 0 to 8; None chooses at most 4 of them by the sizes of the rows.
    center : bool, default=True
        Whether the mean row is taken off first; the table keeps it.
    rotation : {None, "random", "dense", "pca", "learned", "auto"}, default="auto"
        How rows are turned before they are coded: at random from a seed, at random by a stored matrix, to principal
        components, by what suits this quantizer best ("product" learns it), or as its other parameters suggest: at
        random with ``bit_allocation="even"``, to principal components with ``bit_allocation="variance"``.
    rotation_dtype : {"float16", "int8", "float32"}, default="float16"
        How a matrix of the rotation is stored.
    residual : quantizer or None, default=None
        Codes what this one leaves over: a row is then the sum of both. Its own random state does not count.
    random_state : int, RandomState, Generator or None, default=None
        Draws a random rotation; an int repeats it.
    n_jobs : int or None, default=None
        Threads; None takes all that the process may use. The result does not depend on it.
    verbose : int, default=0
        1 prints progress.

    Attributes
    ----------
    row_bytes_ : int
        Bytes of a row's code.
    n_iter_ : int
        Rounds of the fit.
    relative_error_ : float
        ‖X − X̂‖² / ‖X‖² of the rows that were fitted.
    n_features_in_ : int
        Number of features seen during fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of features seen during fit, if X had names that are all strings.

    See Also
    --------
    ProductQuantizer : Faster to encode and to search.

    References
    ----------
    A. Tseng, Q. Sun, D. Hou, C. De Sa, "QTIP: Quantization with trellises and incoherence processing", 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from vqrs import TrellisQuantizer
    >>> x = np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32)
    >>> quantizer = TrellisQuantizer(n_bits=2, random_state=0).fit(x)
    >>> quantizer.row_bytes_
    16
    >>> bool(quantizer.relative_error_ < 0.08)  # the best levels for each value alone reach 0.117
    True
    """

    _kind = "trellis"

    def __init__(
        self,
        n_bits: float = 2.0,
        *,
        state_bits: int = 12,
        bit_allocation: str = "even",
        scale_bits: int | None = None,
        center: bool = True,
        rotation: str | None = "auto",
        rotation_dtype: str = "float16",
        residual: Quantizer | None = None,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_bits = n_bits
        self.state_bits = state_bits
        self.bit_allocation = bit_allocation
        self.scale_bits = scale_bits
        self.center = center
        self.rotation = rotation
        self.rotation_dtype = rotation_dtype
        self.residual = residual
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose
