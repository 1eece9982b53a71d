//! k-means without codes, for the estimator `KMeans`.

use crate::array::{checked, matrix, rows};
use crate::call::long;
use numpy::{PyArray1, PyArray2, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use vqrs_core::algo::assign;
use vqrs_core::algo::kmeans::{Init, KMeans, Metric};
use vqrs_core::error::Error;
use vqrs_core::matrix::{Matrix, Sample};
use vqrs_core::pool::Context;

fn metric_of(name: &str) -> PyResult<Metric> {
    match name {
        "euclidean" => Ok(Metric::Euclidean),
        "cosine" => Ok(Metric::Cosine),
        other => checked(Err(Error::parameter("metric", format!("{other:?}"), "must be euclidean or cosine"))),
    }
}

fn same_width(x: Matrix, centers: Matrix) -> PyResult<()> {
    if x.dim() == centers.dim() {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("X has {} features, but the centers have {}", x.dim(), centers.dim())))
}

/// (centers, labels, inertia, n_iter, distinct)
#[pyfunction]
#[pyo3(signature = (x, n_clusters, *, init=None, n_init=1, sample_weight=None, max_iter=300, tol=1e-4, metric="euclidean", batch_size=None, max_samples=None, seed=0, n_jobs=None, progress=None))]
#[allow(clippy::type_complexity)]
pub fn kmeans_fit<'py>(
    py: Python<'py>,
    x: PyReadonlyArray2<'py, f32>,
    n_clusters: usize,
    init: Option<Bound<'py, PyAny>>,
    n_init: usize,
    sample_weight: Option<PyReadonlyArray1<'py, f64>>,
    max_iter: usize,
    tol: f64,
    metric: &str,
    batch_size: Option<usize>,
    max_samples: Option<usize>,
    seed: u64,
    n_jobs: Option<i64>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<(Bound<'py, PyArray2<f32>>, Bound<'py, PyArray1<i32>>, f64, usize, usize)> {
    let x = matrix(&x)?;
    let weights = sample_weight.as_ref().map(|w| w.as_slice()).transpose()?;
    let name = init.as_ref().and_then(|i| i.extract::<String>().ok());
    let given = match (&init, &name) {
        (Some(array), None) => Some(array.extract::<PyReadonlyArray2<f32>>()?),
        _ => None,
    };
    let init = match (&given, name.as_deref()) {
        (Some(centers), _) => {
            let centers = matrix(centers)?;
            same_width(x, centers)?;
            if centers.rows() != n_clusters {
                let text = format!("init has {} centers, expected n_clusters={n_clusters}", centers.rows());
                return Err(PyValueError::new_err(text));
            }
            checked(centers.check())?;
            Init::Centers(centers.data())
        }
        (None, None | Some("k-means++")) => Init::PlusPlus,
        (None, Some("random")) => Init::Random,
        (None, Some(other)) => {
            let expected = "must be k-means++, random or an array";
            return checked(Err(Error::parameter("init", format!("{other:?}"), expected)));
        }
    };
    let kmeans =
        KMeans { n_clusters, max_iter, tol, n_init, init, metric: metric_of(metric)?, batch_size, max_samples };
    let ctx = Context::new(n_jobs, seed);
    ctx.stage("k-means", max_iter.saturating_mul(n_init) as u64);
    let found = long(py, &ctx, progress.as_ref(), || {
        let sample = Sample::new(x, weights, &ctx)?;
        kmeans.fit(sample.rows.into(), sample.weights, &ctx)
    })?;
    let labels: Vec<i32> = found.labels.into_iter().map(|l| l as i32).collect();
    let centers = rows(py, found.centers, x.dim())?;
    Ok((centers, PyArray1::from_vec(py, labels), found.inertia, found.n_iter, found.distinct))
}

/// Labels and squared distances (cosine: 1 - cosine) of the nearest centers.
#[pyfunction]
#[pyo3(signature = (x, centers, metric, n_jobs=None))]
#[allow(clippy::type_complexity)]
pub fn kmeans_predict<'py>(
    py: Python<'py>,
    x: PyReadonlyArray2<'py, f32>,
    centers: PyReadonlyArray2<'py, f32>,
    metric: &str,
    n_jobs: Option<i64>,
) -> PyResult<(Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<f32>>)> {
    let (x, centers, metric) = (matrix(&x)?, matrix(&centers)?, metric_of(metric)?);
    same_width(x, centers)?;
    let ctx = Context::new(n_jobs, 0);
    let (labels, distances) = long(py, &ctx, None, || {
        x.check_all(&ctx)?;
        assign::predict(x, centers, metric, &ctx)
    })?;
    let labels: Vec<i32> = labels.into_iter().map(|l| l as i32).collect();
    Ok((PyArray1::from_vec(py, labels), PyArray1::from_vec(py, distances)))
}

/// Distances to all centers.
#[pyfunction]
#[pyo3(signature = (x, centers, metric, n_jobs=None))]
pub fn kmeans_transform<'py>(
    py: Python<'py>,
    x: PyReadonlyArray2<'py, f32>,
    centers: PyReadonlyArray2<'py, f32>,
    metric: &str,
    n_jobs: Option<i64>,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let (x, centers, metric) = (matrix(&x)?, matrix(&centers)?, metric_of(metric)?);
    same_width(x, centers)?;
    let ctx = Context::new(n_jobs, 0);
    let distances = long(py, &ctx, None, || {
        x.check_all(&ctx)?;
        assign::transform(x, centers, metric, &ctx)
    })?;
    rows(py, distances, centers.rows())
}
