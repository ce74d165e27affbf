// SPDX-License-Identifier: Apache-2.0
use crate::Status;
use std::fmt;

/// What a fallible call returns.
pub type Result<T> = std::result::Result<T, Error>;

/// A status and the library's text on it.
///
/// The text is the last one of the [`Context`](crate::Context): if calls in several threads fail at the
/// same moment, it may be that of another of them. The status is always that of this call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    status: Status,
    message: String,
}

impl Error {
    pub(crate) fn new(status: Status, message: impl Into<String>) -> Self {
        Error {
            status,
            message: message.into(),
        }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Error::new(Status::Invalid, message)
    }

    /// What went wrong.
    pub fn status(&self) -> Status {
        self.status
    }

    /// What exactly, for people: the argument, the expected shape, the JSON path.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.status)?;
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
