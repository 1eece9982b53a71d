use super::*;

fn ctx(threads: i64) -> Context {
    Context::new(Some(threads), 7)
}

fn normal(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..count).map(|_| rng.normal() as f32).collect()
}

/// Rows around `clusters` centres on a coarse grid.
fn clustered(seed: u64, rows: usize, width: usize, clusters: usize) -> Vec<f32> {
    let centers = normal(seed, clusters * width);
    let mut rng = Rng::new(seed + 1);
    let mut x = Vec::new();
    for _ in 0..rows {
        let center = &centers[rng.below(clusters) * width..][..width];
        x.extend(center.iter().map(|c| 10.0 * c + rng.normal() as f32));
    }
    x
}

fn brute(x: Columns, centers: &[f32], used: usize) -> Vec<u32> {
    let distance = |row: usize, j: usize| squared_distance(x.row(row), &centers[j * x.width()..][..x.width()]);
    let of_row = |row: usize| {
        let better = |a: usize, b: usize| if distance(row, b) < distance(row, a) { b } else { a };
        (0..used).reduce(better).unwrap() as u32
    };
    (0..x.rows()).map(of_row).collect()
}

fn bits(clusters: &Clusters) -> (Vec<u32>, Vec<u32>, u64, usize, usize) {
    let centers = clusters.centers.iter().map(|v| v.to_bits()).collect();
    (centers, clusters.labels.clone(), clusters.inertia.to_bits(), clusters.n_iter, clusters.distinct)
}

/// Every way to fit: metric, seeding, batches, sub-samples.
fn variants(k: usize) -> Vec<KMeans<'static>> {
    let plain = KMeans::new(k);
    vec![
        plain.clone(),
        KMeans { init: Init::Random, n_init: 3, ..plain.clone() },
        KMeans { metric: Metric::Cosine, ..plain.clone() },
        KMeans { max_samples: Some(60), ..plain.clone() },
        KMeans { batch_size: Some(50), max_iter: 5, ..plain.clone() },
        KMeans { batch_size: Some(50), metric: Metric::Cosine, max_samples: Some(100), ..plain },
    ]
}

#[test]
fn inertia_never_increases() {
    for (seed, weighted) in [(1, false), (2, true), (3, false)] {
        let (rows, width, k) = (700, 5, 40);
        let x = clustered(seed, rows, width, 9);
        let weights: Vec<f64> = (0..rows).map(|row| (row % 4) as f64).collect();
        let start = x[..k * width].to_vec();
        let mut last = f64::INFINITY;
        for max_iter in 0..12 {
            let kmeans = KMeans { max_iter, tol: 0.0, init: Init::Centers(&start), ..KMeans::new(k) };
            let weights = weighted.then_some(weights.as_slice());
            let fit = kmeans.fit(Columns::contiguous(&x, width), weights, &ctx(2)).unwrap();
            assert!(fit.inertia <= last * (1.0 + 1e-9), "{} after {last}", fit.inertia);
            last = fit.inertia;
        }
    }
}

#[test]
fn centres_are_means_and_labels_are_nearest() {
    let (rows, width, k) = (900, 6, 12);
    let x = clustered(4, rows, width + 2, 20);
    let matrix = crate::matrix::Matrix::new(&x, width + 2).unwrap();
    let x = Columns::new(matrix, 2, width);
    let weights: Vec<f64> = (0..rows).map(|row| (row % 3) as f64 * 0.7).collect();
    let kmeans = KMeans { max_iter: 300, tol: 0.0, ..KMeans::new(k) };
    let fit = kmeans.fit(x, Some(&weights), &ctx(2)).unwrap();
    assert!(fit.n_iter < 300 && fit.distinct == k);
    assert_eq!(fit.labels, brute(x, &fit.centers, k));
    for cluster in 0..k {
        let members = || (0..rows).filter(|row| fit.labels[*row] == cluster as u32);
        let weight: f64 = members().map(|row| weights[row]).sum();
        for t in 0..width {
            let sum: f64 = members().map(|row| weights[row] * f64::from(x.row(row)[t])).sum();
            let center = f64::from(fit.centers[cluster * width + t]);
            assert!((sum / weight - center).abs() <= 1e-6 * (1.0 + center.abs()));
        }
    }
    let center = |row: usize| &fit.centers[fit.labels[row] as usize * width..][..width];
    let expected: f64 = (0..rows).map(|row| weights[row] * squared_distance(x.row(row), center(row))).sum();
    assert!((fit.inertia - expected).abs() < 1e-9 * expected);
}

#[test]
fn labels_are_nearest_with_ties_too() {
    // Integers on a line: many rows are just as far from two centres.
    let x: Vec<f32> = (0..200).map(|i| (i * 7 % 20) as f32).collect();
    let x = Columns::contiguous(&x, 1);
    for k in [2, 3, 5, 7] {
        for kmeans in variants(k) {
            if kmeans.metric == Metric::Euclidean {
                let fit = kmeans.fit(x, None, &ctx(1)).unwrap();
                assert_eq!(fit.labels, brute(x, &fit.centers, fit.distinct));
            }
        }
    }
}

#[test]
fn as_many_clusters_as_rows_leave_no_error() {
    // 12 different rows, each several times, with 0 and -0 among the values.
    let values: Vec<f32> = (0..24).map(|i| [(i / 2) as f32 - 5.0, if i % 4 < 2 { 0.0 } else { -0.0 }][i % 2]).collect();
    let x: Vec<f32> = (0..60).flat_map(|row| values[row % 12 * 2..][..2].to_vec()).collect();
    let x = Columns::contiguous(&x, 2);
    for init in [Init::PlusPlus, Init::Random] {
        for k in [12, 13, 40, 100] {
            let fit = KMeans { init, ..KMeans::new(k) }.fit(x, None, &ctx(2)).unwrap();
            assert_eq!((fit.inertia, fit.distinct), (0.0, 12));
            assert_eq!(fit.centers.len(), k * 2);
            assert!(fit.labels.iter().all(|label| *label < 12));
            assert!(fit.centers[12 * 2..].chunks(2).all(|center| center == &fit.centers[11 * 2..12 * 2]));
            for row in 0..60 {
                assert_eq!(x.row(row), &fit.centers[fit.labels[row] as usize * 2..][..2]);
            }
        }
    }
}

#[test]
fn integer_weights_repeat_rows() {
    let (rows, width, k) = (300, 4, 10);
    // Multiples of 1/8: sums are exact in any order.
    let x: Vec<f32> = clustered(5, rows, width, 10).iter().map(|v| (v * 8.0).round() / 8.0).collect();
    let weights: Vec<f64> = (0..rows).map(|row| (row % 4) as f64).collect();
    let start: Vec<f32> = x[..k * width].to_vec();
    let repeated: Vec<f32> =
        (0..rows).flat_map(|row| x[row * width..][..width].repeat(weights[row] as usize)).collect();
    let kmeans = KMeans { init: Init::Centers(&start), ..KMeans::new(k) };
    let weighted = kmeans.fit(Columns::contiguous(&x, width), Some(&weights), &ctx(1)).unwrap();
    let plain = kmeans.fit(Columns::contiguous(&repeated, width), None, &ctx(1)).unwrap();
    assert_eq!(weighted.centers, plain.centers);
    assert_eq!(weighted.n_iter, plain.n_iter);
    assert!((weighted.inertia - plain.inertia).abs() < 1e-9 * plain.inertia);
}

#[test]
fn scale_and_shift() {
    let (rows, width, k) = (400, 3, 8);
    let x: Vec<f32> = clustered(6, rows, width, 8).iter().map(|v| (v * 16.0).round() / 16.0).collect();
    let scaled: Vec<f32> = x.iter().map(|v| v * 1024.0).collect();
    let moved: Vec<f32> = x.iter().map(|v| v + 512.0).collect();
    for kmeans in variants(k) {
        let plain = kmeans.fit(Columns::contiguous(&x, width), None, &ctx(1)).unwrap();
        let big = kmeans.fit(Columns::contiguous(&scaled, width), None, &ctx(1)).unwrap();
        assert_eq!(big.labels, plain.labels);
        if kmeans.metric == Metric::Euclidean {
            assert!(plain.centers.iter().zip(&big.centers).all(|(a, b)| a * 1024.0 == *b));
            let far = kmeans.fit(Columns::contiguous(&moved, width), None, &ctx(1)).unwrap();
            assert!((far.inertia - plain.inertia).abs() < 1e-3 * plain.inertia);
        } else {
            assert_eq!(plain.centers, big.centers);
        }
    }
}

#[test]
fn threads_change_nothing() {
    let (rows, width) = (9000, 4);
    let x = clustered(8, rows, width, 30);
    let x = Columns::contiguous(&x, width);
    let weights: Vec<f64> = (0..rows).map(|row| 0.1 + (row % 7) as f64).collect();
    for kmeans in variants(50) {
        for weights in [None, Some(weights.as_slice())] {
            let fits: Vec<_> = (1..=3).map(|n| bits(&kmeans.fit(x, weights, &ctx(n)).unwrap())).collect();
            assert!(fits[0] == fits[1] && fits[0] == fits[2]);
        }
    }
}

#[test]
fn permuted_rows_permute_labels() {
    let (rows, width, k) = (300, 3, 9);
    let x: Vec<f32> = clustered(9, rows, width, 9).iter().map(|v| (v * 8.0).round() / 8.0).collect();
    let start = x[..k * width].to_vec();
    let order: Vec<usize> = (0..rows).map(|row| row * 7 % rows).collect();
    let permuted: Vec<f32> = order.iter().flat_map(|row| x[row * width..][..width].to_vec()).collect();
    let kmeans = KMeans { init: Init::Centers(&start), ..KMeans::new(k) };
    let a = kmeans.fit(Columns::contiguous(&x, width), None, &ctx(1)).unwrap();
    let b = kmeans.fit(Columns::contiguous(&permuted, width), None, &ctx(1)).unwrap();
    assert_eq!(a.centers, b.centers);
    assert!(order.iter().enumerate().all(|(new, old)| a.labels[*old] == b.labels[new]));
}

#[test]
fn empty_clusters_are_filled() {
    let (rows, width, k) = (500, 2, 20);
    let x = clustered(10, rows, width, 20);
    // All but one of the first centres are equal and too far away to win a row.
    let mut start = vec![1e4; k * width];
    start[..width].copy_from_slice(&x[..width]);
    let kmeans = KMeans { init: Init::Centers(&start), max_iter: 100, ..KMeans::new(k) };
    let fit = kmeans.fit(Columns::contiguous(&x, width), None, &ctx(2)).unwrap();
    let mut seen = vec![false; k];
    fit.labels.iter().for_each(|label| seen[*label as usize] = true);
    assert!(seen.iter().all(|seen| *seen));
    let one = KMeans::new(1).fit(Columns::contiguous(&x, width), None, &ctx(2)).unwrap();
    assert!(fit.inertia < one.inertia / 2.0);
}

#[test]
fn edges() {
    let constant = [3.0f32; 40];
    let zeros = [0.0f32; 40];
    for data in [&constant, &zeros] {
        for width in [1, 4] {
            for kmeans in variants(3) {
                let fit = kmeans.fit(Columns::contiguous(data, width), None, &ctx(2)).unwrap();
                assert_eq!((fit.distinct, fit.centers.len()), (1, 3 * width));
                assert!(fit.labels.iter().all(|label| *label == 0));
                let none = data[0] == 0.0 && kmeans.metric == Metric::Cosine;
                assert!((fit.inertia - if none { (40 / width) as f64 } else { 0.0 }).abs() < 1e-6);
            }
        }
    }
    // One row, and one row with weight.
    let fit = KMeans::new(1).fit(Columns::contiguous(&[1.0, 2.0], 2), None, &ctx(1)).unwrap();
    assert_eq!((fit.centers, fit.labels, fit.inertia), (vec![1.0, 2.0], vec![0], 0.0));
    for kmeans in variants(2) {
        let fit = kmeans.fit(Columns::contiguous(&[1.0, 2.0, 4.0], 1), Some(&[0.0, 1.0, 0.0]), &ctx(1)).unwrap();
        assert_eq!((fit.distinct, fit.labels), (1, vec![0; 3]));
    }
}

#[test]
fn cosine_ignores_length() {
    let x: Vec<f32> = (0..40).flat_map(|i| [[(i + 1) as f32, 0.0], [0.0, -2.0 * (i + 1) as f32]][i % 2]).collect();
    let kmeans = KMeans { metric: Metric::Cosine, ..KMeans::new(2) };
    let fit = kmeans.fit(Columns::contiguous(&x, 2), None, &ctx(1)).unwrap();
    assert!(fit.inertia.abs() < 1e-9);
    assert!((0..40).all(|row| fit.labels[row] == fit.labels[row % 2]) && fit.labels[0] != fit.labels[1]);
}

#[test]
fn large_problems_are_seeded_from_a_sub_sample() {
    // Few distinct rows in the sub-sample of 64 * 2 rows, more in all of them.
    let (rows, width) = (20_000, 1);
    let x: Vec<f32> = (0..rows).map(|row| if row == 777 { 5.0 } else { 1.0 }).collect();
    let columns = Columns::contiguous(&x, width);
    let all = Rows { x: columns, weights: None };
    // Through the function for large problems, whatever the size of this one.
    let centers = seeding::in_rounds(&all, 2, &mut Rng::new(1), &ctx(1)).unwrap();
    assert_eq!(centers.len(), 2);
    let x = clustered(11, 5000, 3, 300);
    let rows = Rows { x: Columns::contiguous(&x, 3), weights: None };
    let centers = seeding::in_rounds(&rows, 300, &mut Rng::new(2), &ctx(2)).unwrap();
    let inertia = |centers: Vec<f32>| judged(&rows, &centers, None, &ctx(2)).unwrap().1;
    let greedy = seeding::plus_plus(&rows, 300, &mut Rng::new(2), &ctx(2)).unwrap();
    assert!(inertia(centers) < 2.5 * inertia(greedy));
}

#[test]
fn mini_batches_come_near() {
    let (rows, width, k) = (4000, 4, 16);
    let x = clustered(12, rows, width, 16);
    let x = Columns::contiguous(&x, width);
    let full = KMeans::new(k).fit(x, None, &ctx(2)).unwrap();
    let mini = KMeans { batch_size: Some(256), ..KMeans::new(k) }.fit(x, None, &ctx(2)).unwrap();
    assert!(mini.inertia < 1.3 * full.inertia, "{} {}", mini.inertia, full.inertia);
    assert_eq!(mini.labels, brute(x, &mini.centers, k));
}

#[test]
fn bad_parameters_are_refused() {
    let x = Columns::contiguous(&[1.0, 2.0], 1);
    let refused = |kmeans: KMeans, weights: Option<&[f64]>| kmeans.fit(x, weights, &ctx(1)).unwrap_err().to_string();
    assert!(refused(KMeans::new(0), None).contains("n_clusters=0"));
    assert!(refused(KMeans { n_init: 0, ..KMeans::new(1) }, None).contains("n_init=0"));
    assert!(refused(KMeans::new(1), Some(&[1.0])).contains("sample_weight has 1 values"));
    assert!(refused(KMeans { init: Init::Centers(&[1.0]), ..KMeans::new(2) }, None).contains("init has 1 values"));
    assert!(KMeans::new(1).fit(Columns::contiguous(&[], 1), None, &ctx(1)).is_err());
    let stopped = ctx(1);
    stopped.cancel();
    assert!(matches!(KMeans::new(1).fit(x, None, &stopped), Err(Error::Interrupted)));
}
