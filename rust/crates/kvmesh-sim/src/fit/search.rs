//! The lowest point of a function without derivatives: Nelder and Mead's simplex (1965) with the coefficients of Gao and
//! Han (2012), which suit more than a few dimensions. It is begun anew around the best point when it has shrunk.

/// A simplex whose values differ by less than this share has found what there is.
const FLAT: f64 = 1e-5;

type Point = (f64, Vec<f64>);

struct Search<F> {
    value: F,
    left: usize,
}

/// The best of about `tries` points, from `start` on, steps being about `step` wide at first; None as soon as `value`
/// is.
pub fn nelder_mead(
    start: &[f64],
    step: f64,
    tries: usize,
    value: impl FnMut(&[f64]) -> Option<f64>,
) -> Option<Vec<f64>> {
    let mut search = Search { value, left: tries };
    let mut best = search.judge(start.to_vec())?;
    let mut width = step;
    while search.left > 0 {
        let before = best.0;
        best = search.descend(best, width)?;
        if before - best.0 < FLAT * before.abs() {
            break;
        }
        width *= -0.5;
    }
    Some(best.1)
}

impl<F: FnMut(&[f64]) -> Option<f64>> Search<F> {
    fn judge(&mut self, point: Vec<f64>) -> Option<Point> {
        self.left = self.left.saturating_sub(1);
        let value = (self.value)(&point)?;
        Some((if value.is_nan() { f64::INFINITY } else { value }, point))
    }

    /// The best point of a simplex around `start`, once it is flat or the tries are spent.
    fn descend(&mut self, start: Point, width: f64) -> Option<Point> {
        let n = start.1.len();
        let dimension = n as f64;
        let expand = 1.0 + 2.0 / dimension;
        let contract = 0.75 - 0.5 / dimension;
        let shrink = 1.0 - 1.0 / dimension;
        let mut simplex = vec![start.clone()];
        for axis in 0..n {
            let mut point = start.1.clone();
            point[axis] += width;
            simplex.push(self.judge(point)?);
        }
        loop {
            simplex.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (low, high) = (simplex[0].0, simplex[n].0);
            let flat = high.is_finite() && high - low <= FLAT * low.abs();
            if flat || self.left == 0 {
                return Some(simplex.swap_remove(0));
            }
            let mean = |axis: usize| simplex[..n].iter().map(|point| point.1[axis]).sum::<f64>();
            let centre: Vec<f64> = (0..n).map(|axis| mean(axis) / dimension).collect();
            let worst = simplex[n].1.clone();
            let beyond = |far: f64| -> Vec<f64> {
                let pairs = centre.iter().zip(&worst);
                pairs.map(|(c, w)| c + far * (c - w)).collect()
            };
            let reflected = self.judge(beyond(1.0))?;
            if reflected.0 < low {
                let expanded = self.judge(beyond(expand))?;
                simplex[n] = if expanded.0 < reflected.0 {
                    expanded
                } else {
                    reflected
                };
                continue;
            }
            if reflected.0 < simplex[n - 1].0 {
                simplex[n] = reflected;
                continue;
            }
            let side = if reflected.0 < high {
                contract
            } else {
                -contract
            };
            let contracted = self.judge(beyond(side))?;
            if contracted.0 < reflected.0.min(high) {
                simplex[n] = contracted;
                continue;
            }
            let anchor = simplex[0].1.clone();
            for point in &mut simplex[1..] {
                let moved = anchor
                    .iter()
                    .zip(&point.1)
                    .map(|(a, p)| a + shrink * (p - a));
                *point = self.judge(moved.collect())?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_bottom_of_a_bent_valley() {
        // Rosenbrock's function.
        let valley = |p: &[f64]| (1.0 - p[0]).powi(2) + 100.0 * (p[1] - p[0] * p[0]).powi(2);
        let found = nelder_mead(&[-1.2, 1.0], 0.5, 2_000, |point| Some(valley(point))).unwrap();
        assert!(
            (found[0] - 1.0).abs() < 0.02 && (found[1] - 1.0).abs() < 0.04,
            "{found:?}"
        );
        assert_eq!(nelder_mead(&[0.0], 0.5, 100, |_| None), None);
    }
}
