//! What every tier must do, run on all of them.

mod durable;
mod fixtures;
mod integrity;
mod life;
mod lookup;
mod room;
#[path = "../common/s3.rs"]
mod s3;
