//! A request's fields, with the bounds of docs/reference/api.md.

use std::{borrow::Cow, fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{SeqAccess, Visitor},
};

use crate::Endpoint;

const INT32_MAX: u32 = i32::MAX as u32;
const MOST_STOPS: usize = 16;

/// What a plain body may say. Absent and null are the same.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlainBody<'a> {
    /// The model's name.
    #[serde(borrow)]
    pub model: Cow<'a, str>,
    /// Of completions.
    #[serde(borrow, default)]
    pub prompt: Option<Prompt<'a>>,
    /// Of chats.
    #[serde(borrow, default)]
    pub messages: Option<Vec<Message<'a>>>,
    /// Tokens of the answer.
    pub max_tokens: Option<u32>,
    /// The same, of chats.
    pub max_completion_tokens: Option<u32>,
    /// 0 to 2.
    pub temperature: Option<f64>,
    /// 0 to 1.
    pub top_p: Option<f64>,
    /// Likeliest tokens to choose from; -1 and 0: all.
    pub top_k: Option<i32>,
    /// -2 to 2.
    pub frequency_penalty: Option<f64>,
    /// -2 to 2.
    pub presence_penalty: Option<f64>,
    /// Of draws.
    pub seed: Option<i64>,
    /// Whether the model's end of text is passed over.
    pub ignore_eos: Option<bool>,
    /// What ends the answer.
    #[serde(borrow, default)]
    pub stop: Option<Stop<'a>>,
    /// Whether the answer comes in pieces.
    pub stream: Option<bool>,
    /// Of these.
    pub stream_options: Option<StreamOptions>,
    /// One.
    pub n: Option<u32>,
    /// Who asks.
    #[serde(borrow, default)]
    pub user: Option<Cow<'a, str>>,
}

/// What there is to say of a streamed answer.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// Whether its last chunk has the usage.
    pub include_usage: Option<bool>,
}

/// What is to be continued.
pub type Prompt<'a> = StringOr<'a, u32>;

/// What ends an answer.
pub type Stop<'a> = StringOr<'a, String>;

/// One string, or a list of something.
#[derive(Debug)]
pub enum StringOr<'a, T> {
    /// One string.
    String(Cow<'a, str>),
    /// A list.
    List(Vec<T>),
}

/// A message of text and no more.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message<'a> {
    /// Who says it.
    pub role: Role,
    /// What is said.
    #[serde(borrow)]
    pub content: Cow<'a, str>,
}

/// Those whose messages are text and no more.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Who sets the rules.
    System,
    /// The same, in newer words.
    Developer,
    /// Who asks.
    User,
    /// Who answers.
    Assistant,
}

impl Role {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::Developer => "developer",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }
}

impl<'a> PlainBody<'a> {
    /// The fields of a body of `endpoint`; None where they are not plain.
    pub(crate) fn read(written: &'a [u8], endpoint: Endpoint) -> Option<Self> {
        let body: Self = serde_json::from_slice(written).ok()?;
        body.is_within_bounds(endpoint).then_some(body)
    }

    fn is_within_bounds(&self, endpoint: Endpoint) -> bool {
        let asks = match endpoint {
            Endpoint::Chat => {
                self.prompt.is_none() && self.messages.as_ref().is_some_and(|m| !m.is_empty())
            }
            Endpoint::Completions => {
                self.messages.is_none()
                    && self.max_completion_tokens.is_none()
                    && self
                        .prompt
                        .as_ref()
                        .is_some_and(|prompt| !prompt.is_empty())
            }
        };
        let stops = match &self.stop {
            None => true,
            Some(Stop::String(stop)) => !stop.is_empty(),
            Some(Stop::List(stops)) => {
                stops.len() <= MOST_STOPS && stops.iter().all(|stop| !stop.is_empty())
            }
        };
        let tokens = |said: Option<u32>| said.is_none_or(|most| (1..=INT32_MAX).contains(&most));
        // A zero below zero is read in more than one way.
        let within = |said: Option<f64>, least: f64, most: f64| {
            said.is_none_or(|value| {
                (least..=most).contains(&value) && (value != 0.0 || value.is_sign_positive())
            })
        };
        asks && stops
            && !self.model.is_empty()
            && tokens(self.max_tokens)
            && tokens(self.max_completion_tokens)
            && within(self.temperature, 0.0, 2.0)
            && within(self.top_p, 0.0, 1.0)
            && self.top_k.is_none_or(|k| k >= -1)
            && within(self.frequency_penalty, -2.0, 2.0)
            && within(self.presence_penalty, -2.0, 2.0)
            && self.n.is_none_or(|n| n == 1)
            && (self.stream_options.is_none() || self.stream == Some(true))
    }
}

impl<T> StringOr<'_, T> {
    fn is_empty(&self) -> bool {
        match self {
            StringOr::String(text) => text.is_empty(),
            StringOr::List(items) => items.is_empty(),
        }
    }
}

// By hand: what serde derives for a choice of types keeps every item until it knows the type, and prompts are long.
impl<'de: 'a, 'a, T: Deserialize<'de> + 'a> Deserialize<'de> for StringOr<'a, T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StringOrVisitor(PhantomData))
    }
}

struct StringOrVisitor<'a, T>(PhantomData<&'a T>);

impl<'de: 'a, 'a, T: Deserialize<'de> + 'a> Visitor<'de> for StringOrVisitor<'a, T> {
    type Value = StringOr<'a, T>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a string or a list")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(StringOr::String(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(StringOr::String(Cow::Owned(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(StringOr::List(list))
    }
}
