//! How fast engines are and what they hold, in a file: what `simulate fit` writes and `simulate --rates` reads.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};

use crate::{Error, Result, job::Shape, timing::Timing};

/// The contents of a rates file.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rates {
    /// How long work takes.
    pub timing: Timing,
    /// The engines' sizes.
    pub shape: Shape,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            timing: Timing::default(),
            shape: Shape {
                blocks: 4096,
                block_tokens: 512,
                pass_tokens: 8192,
                max_running: 256,
            },
        }
    }
}

impl Rates {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self> {
        let wrong = |error: String| Error::invalid(error).in_file(path);
        let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        let rates: Self = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        rates.timing.check().map_err(|error| error.in_file(path))?;
        Ok(rates)
    }

    /// Writes a file.
    pub fn write(&self, path: &Path) -> Result<()> {
        let wrong = |error: String| Error::invalid(error).in_file(path);
        let text = serde_json::to_string_pretty(self).map_err(|error| wrong(error.to_string()))?;
        fs::write(path, text + "\n").map_err(|error| wrong(error.to_string()))
    }
}
