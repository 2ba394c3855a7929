//! Linear least squares, online: a prior, forgetting, and little trust in outliers.

/// Coefficients of `N` features, learned from observations.
///
/// Minimises the squared *relative* errors, each old one discounted by [`Fit::KEEP`] a newer one, plus the prior's
/// pull on every coefficient in proportion to its own size (ridge regression towards the prior). An observation
/// off by more than [`Fit::TRUST`] of the prediction weighs less, so that its pull stays bounded (Huber's M-estimator,
/// 1964). Coefficients are never negative: more work takes no less time.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(into = "Saved", try_from = "Saved")]
pub struct Fit<const N: usize> {
    prior: [f64; N],
    floor: [f64; N],
    squares: [[f64; N]; N],
    products: [f64; N],
    coefficients: [f64; N],
    quality: Quality,
}

/// A fit whose size is not in its type, to be kept.
#[derive(serde::Serialize, serde::Deserialize)]
struct Saved {
    prior: Vec<f64>,
    floor: Vec<f64>,
    squares: Vec<Vec<f64>>,
    products: Vec<f64>,
    coefficients: Vec<f64>,
    quality: Quality,
}

impl<const N: usize> From<Fit<N>> for Saved {
    fn from(fit: Fit<N>) -> Self {
        Self {
            prior: fit.prior.to_vec(),
            floor: fit.floor.to_vec(),
            squares: fit.squares.map(|row| row.to_vec()).to_vec(),
            products: fit.products.to_vec(),
            coefficients: fit.coefficients.to_vec(),
            quality: fit.quality,
        }
    }
}

impl<const N: usize> TryFrom<Saved> for Fit<N> {
    type Error = &'static str;

    fn try_from(saved: Saved) -> Result<Self, Self::Error> {
        let wrong = "a law with another number of coefficients";
        let row = |row: Vec<f64>| <[f64; N]>::try_from(row).map_err(|_| wrong);
        let squares: Result<Vec<[f64; N]>, _> = saved.squares.into_iter().map(row).collect();
        Ok(Self {
            prior: row(saved.prior)?,
            floor: row(saved.floor)?,
            squares: squares?.try_into().map_err(|_| wrong)?,
            products: row(saved.products)?,
            coefficients: row(saved.coefficients)?,
            quality: saved.quality,
        })
    }
}

/// How well a fit's predictions have held, each judged before it was learned from.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Quality {
    /// Observations.
    pub count: u64,
    /// Mean relative error of late, as a share of the prediction.
    pub error: f64,
}

impl Quality {
    /// Discount of the past by each observation, once there are as many.
    const KEEP: f64 = 0.98;

    /// Takes a relative error in.
    pub(crate) fn observe(&mut self, error: f64) {
        self.count += 1;
        let step = (1.0 / self.count as f64).max(1.0 - Self::KEEP);
        self.error += step * (error - self.error);
    }
}

impl<const N: usize> Fit<N> {
    /// Discount of the past by each observation: half is forgotten after some 350.
    pub const KEEP: f64 = 0.998;
    /// Relative error beyond which an observation counts as an outlier.
    pub const TRUST: f64 = 0.3;
    /// Pull of the prior: the square of an observation's relative error, some 0.2, over that of a prior coefficient, 0.5.
    pub const PRIOR: f64 = 0.16;

    /// Times its prior at which a measured coefficient shows that the prior was of another order.
    const FAR: f64 = 10.0;

    /// Starts at `prior`. `floor` is, for each coefficient, the size below which a difference means nothing;
    /// it sets how freely one may move whose prior is 0.
    pub fn new(prior: [f64; N], floor: [f64; N]) -> Self {
        Self {
            prior,
            floor,
            squares: [[0.0; N]; N],
            products: [0.0; N],
            coefficients: prior,
            quality: Quality::default(),
        }
    }

    /// One that starts at other coefficients and was taught nothing.
    pub fn starting_at(&self, coefficients: [f64; N]) -> Self {
        Self::new(coefficients, self.floor)
    }

    /// What these features are expected to take.
    pub fn predict(&self, features: &[f64; N]) -> f64 {
        dot(&self.coefficients, features)
    }

    /// The coefficients now.
    pub fn coefficients(&self) -> &[f64; N] {
        &self.coefficients
    }

    /// How well its predictions hold.
    pub fn quality(&self) -> Quality {
        self.quality
    }

    /// Learns that `features` took `actual`. Anything but a positive, finite one is ignored.
    pub fn observe(&mut self, features: &[f64; N], actual: f64) {
        let expected = self.predict(features);
        if !(actual > 0.0 && actual.is_finite() && expected > 0.0) {
            return;
        }
        let error = ((actual - expected) / expected).abs();
        self.quality.observe(error);
        let weight = (Self::TRUST / error).min(1.0) / (expected * expected);
        for i in 0..N {
            for j in 0..N {
                self.squares[i][j] =
                    self.squares[i][j] * Self::KEEP + weight * features[i] * features[j];
            }
            self.products[i] = self.products[i] * Self::KEEP + weight * features[i] * actual;
        }
        self.solve();
    }

    /// Starts anew from what was measured in quiet: the coefficients that fit it best become the prior. What
    /// the measurements leave open stays as it was.
    pub fn measured(&mut self, points: impl Iterator<Item = ([f64; N], f64)>) {
        let mut fit = Self::new(self.coefficients, self.floor);
        for (features, actual) in points.filter(|(_, ms)| *ms > 0.0 && ms.is_finite()) {
            // So often that the old prior hardly counts.
            let weight = 1e4 / (actual * actual);
            for i in 0..N {
                for j in 0..N {
                    fit.squares[i][j] += weight * features[i] * features[j];
                }
                fit.products[i] += weight * features[i] * actual;
            }
        }
        fit.solve();
        // A prior pulls in proportion to its own size: one that is a hundred times too small holds its coefficient halfway
        // even so, and what it has given way to takes its place.
        if (0..N).any(|i| fit.coefficients[i] > Self::FAR * fit.prior[i].max(fit.floor[i])) {
            fit.prior = fit.coefficients;
            fit.solve();
        }
        *self = Self::new(fit.coefficients, self.floor);
    }

    fn solve(&mut self) {
        let mut rows = self.squares;
        let mut right = self.products;
        for i in 0..N {
            let scale = self.prior[i].max(self.floor[i]);
            let pull = Self::PRIOR / (scale * scale);
            rows[i][i] += pull;
            right[i] += pull * self.prior[i];
        }
        if let Some(solution) = eliminate(rows, right) {
            self.coefficients = solution.map(|value| value.max(0.0));
        }
    }
}

fn dot<const N: usize>(a: &[f64; N], b: &[f64; N]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Solves a positive definite system by Gaussian elimination, rows scaled first; None when it is singular.
fn eliminate<const N: usize>(mut rows: [[f64; N]; N], mut right: [f64; N]) -> Option<[f64; N]> {
    let scale: [f64; N] = std::array::from_fn(|i| 1.0 / rows[i][i].sqrt());
    if scale.iter().any(|value| !value.is_finite()) {
        return None;
    }
    for i in 0..N {
        for j in 0..N {
            rows[i][j] *= scale[i] * scale[j];
        }
        right[i] *= scale[i];
    }
    for pivot in 0..N {
        if rows[pivot][pivot] < 1e-12 {
            return None;
        }
        let above = rows[pivot];
        for below in pivot + 1..N {
            let factor = rows[below][pivot] / above[pivot];
            for (value, &over) in rows[below].iter_mut().zip(&above).skip(pivot) {
                *value -= factor * over;
            }
            right[below] -= factor * right[pivot];
        }
    }
    let mut solution = [0.0; N];
    for i in (0..N).rev() {
        let known: f64 = (i + 1..N).map(|j| rows[i][j] * solution[j]).sum();
        solution[i] = (right[i] - known) / rows[i][i];
    }
    for i in 0..N {
        solution[i] *= scale[i];
    }
    Some(solution)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pass of some tokens takes `16 + 0.015 n + 4e-7 n^2` in truth.
    fn truth(n: f64) -> ([f64; 3], f64) {
        ([1.0, n, n * n], 16.0 + 0.015 * n + 4e-7 * n * n)
    }

    fn sizes() -> impl Iterator<Item = f64> {
        (0..2000).map(|i| 100.0 + f64::from((i * 7919) % 8000))
    }

    #[test]
    fn finds_a_law_far_from_its_prior() {
        let mut fit = Fit::new([5.0, 0.1, 0.0], [1.0, 1e-3, 1e-7]);
        for n in sizes() {
            let (features, actual) = truth(n);
            fit.observe(&features, actual);
        }
        for n in [500.0, 2000.0, 8000.0] {
            let (features, actual) = truth(n);
            let ratio = fit.predict(&features) / actual;
            assert!((0.95..1.05).contains(&ratio), "{n}: {ratio}");
        }
    }

    #[test]
    fn outliers_move_it_little() {
        let mut fit = Fit::new([16.0, 0.015, 4e-7], [1.0, 1e-3, 1e-7]);
        for (i, n) in sizes().enumerate() {
            let (features, actual) = truth(n);
            fit.observe(&features, if i % 20 == 0 { 50.0 * actual } else { actual });
        }
        let (features, actual) = truth(4000.0);
        assert!((fit.predict(&features) / actual - 1.0).abs() < 0.1);
    }

    #[test]
    fn ignores_what_cannot_be() {
        let mut fit = Fit::new([1.0], [1.0]);
        let before = fit.clone();
        for actual in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            fit.observe(&[1.0], actual);
        }
        assert_eq!(fit, before);
    }
}
