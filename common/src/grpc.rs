//! A layer around gRPC services that counts calls and bounds their time. It knows the protocol's headers, no service.
//!
//! Every call is counted once, when its last byte was sent or its caller went away, with the canonical code of its
//! trailers. Labels come from the list of methods given at start; anything else is `unknown`. A unary call ends with
//! DEADLINE_EXCEEDED at the earlier of the client's `grpc-timeout` and the server's maximum; a stream only at the
//! client's, and, where its service does not end it by itself, with UNAVAILABLE at shutdown.

use std::{
    collections::HashMap,
    error::Error as StdError,
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body, Frame, SizeHint};
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service};

use crate::telemetry::Metrics;

/// Names of the canonical codes, by number.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];
const OK: usize = 0;
const CANCELLED: usize = 1;
const DEADLINE_EXCEEDED: usize = 4;
const UNIMPLEMENTED: usize = 12;
const UNAVAILABLE: usize = 14;

/// Percent-encoded, as the header wants it, which changes nothing here.
const NOT_SERVED: &str = "this listener does not serve the method; clients are served by the primary, the replication \
                          stream and reads of the copy by the backup; after a change of role look at the status of both \
                          sides, and exchange the two addresses";

/// A method that is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Method {
    /// `understudy.v1.BlockService`.
    pub service: String,
    /// `WriteBlock`.
    pub method: String,
    /// One of its sides is a stream.
    pub streaming: bool,
    /// Its service ends its streams at shutdown; those of other services are ended by the layer.
    pub drains: bool,
}

/// The layer. Cheap to clone.
#[derive(Debug, Clone)]
pub struct GrpcLayer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    methods: HashMap<String, Arc<Entry>>,
    unknown: Arc<Entry>,
    requests: IntCounterVec,
    seconds: HistogramVec,
    deadline: Duration,
    shutdown: CancellationToken,
}

/// A method, and its metrics once they are needed: looking them up by label costs more than counting.
#[derive(Debug)]
struct Entry {
    method: Method,
    ok: OnceLock<IntCounter>,
    seconds: OnceLock<Histogram>,
}

impl Entry {
    fn new(method: Method) -> Arc<Self> {
        Arc::new(Self { method, ok: OnceLock::new(), seconds: OnceLock::new() })
    }
}

/// An end that comes from outside of the service.
#[derive(Debug)]
struct End {
    code: usize,
    message: String,
}

type Expiry = Pin<Box<dyn Future<Output = End> + Send>>;

impl GrpcLayer {
    /// For calls of `methods`; unary ones end after `deadline` at the latest.
    #[must_use]
    pub fn new(
        methods: impl IntoIterator<Item = Method>,
        metrics: &Metrics,
        deadline: Duration,
        shutdown: CancellationToken,
    ) -> Self {
        let by_path = |method: Method| (format!("/{}/{}", method.service, method.method), Entry::new(method));
        Self {
            shared: Arc::new(Shared {
                methods: methods.into_iter().map(by_path).collect(),
                unknown: Entry::new(Method {
                    service: "unknown".into(),
                    method: "unknown".into(),
                    streaming: false,
                    drains: true,
                }),
                requests: metrics.grpc_requests.clone(),
                seconds: metrics.grpc_request_seconds.clone(),
                deadline,
                shutdown,
            }),
        }
    }
}

impl<S> Layer<S> for GrpcLayer {
    type Service = Grpc<S>;

    fn layer(&self, inner: S) -> Grpc<S> {
        Grpc { inner, shared: self.shared.clone() }
    }
}

/// A service with the layer around it.
#[derive(Debug, Clone)]
pub struct Grpc<S> {
    inner: S,
    shared: Arc<Shared>,
}

impl<S, I, B> Service<Request<I>> for Grpc<S>
where
    S: Service<Request<I>, Response = Response<B>>,
    B: Body<Data = Bytes>,
{
    type Response = Response<GrpcBody<B>>;
    type Error = S::Error;
    type Future = GrpcFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<I>) -> GrpcFuture<S::Future> {
        let entry = self.shared.methods.get(request.uri().path()).unwrap_or(&self.shared.unknown);
        let method = &entry.method;
        let asked = request.headers().get("grpc-timeout").and_then(parse_timeout);
        let allowed = match (method.streaming, asked) {
            (true, asked) => asked,
            (false, asked) => Some(asked.unwrap_or(self.shared.deadline).min(self.shared.deadline)),
        };
        let call = Call { entry: entry.clone(), shared: self.shared.clone(), started: Instant::now(), code: None };
        let expiry = expiry(allowed, (!method.drains).then(|| self.shared.shutdown.clone()));
        GrpcFuture { inner: self.inner.call(request), expiry, call: Some(call) }
    }
}

/// What ends a call from outside: its deadline, or shutdown. `None` where nothing does.
fn expiry(allowed: Option<Duration>, shutdown: Option<CancellationToken>) -> Option<Expiry> {
    if allowed.is_none() && shutdown.is_none() {
        return None;
    }
    let at = allowed.and_then(|allowed| Instant::now().checked_add(allowed));
    Some(Box::pin(async move {
        let late = async {
            match at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let draining = async {
            match &shutdown {
                Some(shutdown) => shutdown.cancelled().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = late => {
                let millis = allowed.unwrap_or_default().as_millis();
                End { code: DEADLINE_EXCEEDED, message: format!("the call did not end within {millis} ms") }
            }
            () = draining => End { code: UNAVAILABLE, message: "draining, try again".to_owned() },
        }
    }))
}

/// Counts when it is dropped. Without a code until then, the caller went away.
#[derive(Debug)]
struct Call {
    entry: Arc<Entry>,
    shared: Arc<Shared>,
    started: Instant,
    code: Option<usize>,
}

impl Call {
    fn ended(&mut self, headers: &HeaderMap) {
        if let Some(status) = headers.get("grpc-status") {
            let number = status.to_str().ok().and_then(|text| text.parse().ok());
            self.code = Some(number.filter(|number| *number < CODES.len()).unwrap_or(2));
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let Self { entry, shared, .. } = &*self;
        let labels = [entry.method.service.as_str(), &entry.method.method];
        let count = |code| shared.requests.with_label_values(&[labels[0], labels[1], CODES[code]]);
        match self.code.unwrap_or(CANCELLED) {
            OK => entry.ok.get_or_init(|| count(OK)).inc(),
            code => count(code).inc(),
        }
        let seconds = entry.seconds.get_or_init(|| shared.seconds.with_label_values(&labels));
        seconds.observe(self.started.elapsed().as_secs_f64());
    }
}

pin_project_lite::pin_project! {
    /// The head of a response, or DEADLINE_EXCEEDED.
    pub struct GrpcFuture<F> {
        #[pin]
        inner: F,
        expiry: Option<Expiry>,
        call: Option<Call>,
    }
}

impl<F, B, E> Future for GrpcFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body<Data = Bytes>,
{
    type Output = Result<Response<GrpcBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(result) = this.inner.poll(context) {
            let mut call = this.call.take().expect("not polled again after it was ready");
            let mut response = result?;
            call.ended(response.headers());
            // The routers refuse what they do not know without a word.
            if call.code == Some(UNIMPLEMENTED) {
                let message = response.headers_mut().entry("grpc-message");
                message.or_insert(HeaderValue::from_static(NOT_SERVED));
            }
            let body = |inner| GrpcBody { inner: Some(inner), expiry: this.expiry.take(), call: Some(call) };
            return Poll::Ready(Ok(response.map(body)));
        }
        let Some(expiry) = this.expiry else { return Poll::Pending };
        let end = ready!(expiry.as_mut().poll(context));
        let mut call = this.call.take().expect("not polled again after it was ready");
        call.code = Some(end.code);
        let mut response = Response::new(GrpcBody { inner: None, expiry: None, call: Some(call) });
        response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
        response.headers_mut().extend(end.headers());
        Poll::Ready(Ok(response))
    }
}

pin_project_lite::pin_project! {
    /// The body of a response; its end is the end of the call.
    pub struct GrpcBody<B> {
        #[pin]
        inner: Option<B>,
        expiry: Option<Expiry>,
        call: Option<Call>,
    }
}

impl<B> Body for GrpcBody<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        let Some(inner) = this.inner.as_mut().as_pin_mut() else { return Poll::Ready(None) };
        if let Poll::Ready(frame) = inner.poll_frame(context) {
            match &frame {
                Some(Ok(frame)) => {
                    if let (Some(trailers), Some(call)) = (frame.trailers_ref(), this.call.as_mut()) {
                        call.ended(trailers);
                    }
                }
                Some(Err(_)) | None => *this.call = None,
            }
            return Poll::Ready(frame);
        }
        let Some(expiry) = this.expiry else { return Poll::Pending };
        let end = ready!(expiry.as_mut().poll(context));
        if let Some(mut call) = this.call.take() {
            call.code = Some(end.code);
        }
        // Dropping it tells the service that nobody waits.
        this.inner.set(None);
        Poll::Ready(Some(Ok(Frame::trailers(end.headers()))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl End {
    fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(2);
        headers.insert("grpc-status", HeaderValue::from(self.code));
        headers.insert("grpc-message", HeaderValue::try_from(&self.message).expect("digits and letters"));
        headers
    }
}

/// `grpc-timeout`: at most 8 digits and a unit. Anything else is ignored, as if it had not been sent.
fn parse_timeout(value: &HeaderValue) -> Option<Duration> {
    let (digits, unit) = value.to_str().ok()?.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body_util::{BodyExt, Channel, Full};
    use tower::ServiceExt;

    use super::*;
    use crate::telemetry::Telemetry;

    fn layer(telemetry: &Telemetry) -> GrpcLayer {
        let method =
            |method: &str, streaming| Method { service: "s.S".into(), method: method.into(), streaming, drains: false };
        let methods = [method("Unary", false), method("Stream", true)];
        GrpcLayer::new(methods, &Metrics::new(telemetry), Duration::from_secs(30), CancellationToken::new())
    }

    fn request(path: &str, timeout: Option<&str>) -> Request<()> {
        let mut request = Request::post(path);
        if let Some(timeout) = timeout {
            request = request.header("grpc-timeout", timeout);
        }
        request.body(()).unwrap()
    }

    fn counted(telemetry: &Telemetry, method: &str, code: &str) -> bool {
        let (service, method) = if method == "unknown" { ("unknown", method) } else { ("s.S", method) };
        let line =
            format!("understudy_grpc_requests_total{{code=\"{code}\",method=\"{method}\",service=\"{service}\"}} 1");
        telemetry.encode().lines().any(|found| found == line)
    }

    #[test]
    fn timeouts_are_read_as_the_protocol_writes_them() {
        let parse = |text: &str| parse_timeout(&HeaderValue::from_str(text).unwrap());
        assert_eq!(parse("1S"), Some(Duration::from_secs(1)));
        assert_eq!(parse("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(parse("250m"), Some(Duration::from_millis(250)));
        for bad in ["", "S", "1", "1x", "-1S", "999999999S"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_unary_call_ends_at_the_earlier_deadline() {
        for (timeout, seconds) in [(Some("2S"), 2), (Some("1H"), 30), (None, 30)] {
            let telemetry = Telemetry::new("test");
            let stuck =
                tower::service_fn(|_: Request<()>| std::future::pending::<Result<Response<Full<Bytes>>, Infallible>>());
            let started = Instant::now();
            let response = layer(&telemetry).layer(stuck).oneshot(request("/s.S/Unary", timeout)).await.unwrap();
            assert_eq!(started.elapsed().as_secs(), seconds);
            assert_eq!(response.headers()["grpc-status"], "4");
            assert!(response.body().is_end_stream());
            drop(response);
            assert!(counted(&telemetry, "Unary", "DEADLINE_EXCEEDED"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_code_comes_from_trailers_and_headers() {
        let telemetry = Telemetry::new("test");
        let layer = layer(&telemetry);
        let answer = |status: &'static str| {
            tower::service_fn(move |_: Request<()>| async move {
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", HeaderValue::from_static(status));
                let body = Full::new(Bytes::from_static(b"x")).with_trailers(async move { Some(Ok(trailers)) });
                Ok::<_, Infallible>(Response::new(body))
            })
        };
        let response = layer.clone().layer(answer("0")).oneshot(request("/s.S/Unary", None)).await.unwrap();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "x");
        assert!(counted(&telemetry, "Unary", "OK"));
        let response = layer.clone().layer(answer("99")).oneshot(request("/no/such", None)).await.unwrap();
        response.into_body().collect().await.unwrap();
        assert!(counted(&telemetry, "unknown", "UNKNOWN"));
        let refused = tower::service_fn(|_: Request<()>| async {
            Ok::<_, Infallible>(Response::builder().header("grpc-status", "5").body(Full::<Bytes>::default()).unwrap())
        });
        drop(layer.layer(refused).oneshot(request("/s.S/Stream", None)).await.unwrap());
        assert!(counted(&telemetry, "Stream", "NOT_FOUND"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_lives_until_the_client_s_deadline_and_no_other() {
        let telemetry = Telemetry::new("test");
        let layer = layer(&telemetry);
        let (_sender, body) = Channel::<Bytes, Infallible>::new(1);
        let body = std::sync::Mutex::new(Some(body));
        let stream = tower::service_fn(|_: Request<()>| {
            let body = body.lock().unwrap().take().unwrap();
            async { Ok::<_, Infallible>(Response::new(body)) }
        });
        let started = Instant::now();
        let response = layer.layer(stream).oneshot(request("/s.S/Stream", Some("1M"))).await.unwrap();
        let ended = response.into_body().collect().await.unwrap();
        assert_eq!(started.elapsed().as_secs(), 60);
        assert_eq!(ended.trailers().unwrap()["grpc-status"], "4");
        assert!(counted(&telemetry, "Stream", "DEADLINE_EXCEEDED"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_its_service_leaves_open_ends_at_shutdown() {
        let telemetry = Telemetry::new("test");
        let layer = layer(&telemetry);
        let stuck =
            tower::service_fn(|_: Request<()>| std::future::pending::<Result<Response<Full<Bytes>>, Infallible>>());
        let call = layer.clone().layer(stuck).oneshot(request("/s.S/Stream", None));
        layer.shared.shutdown.cancel();
        assert_eq!(call.await.unwrap().headers()["grpc-status"], "14");
        assert!(counted(&telemetry, "Stream", "UNAVAILABLE"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_goes_away_is_counted() {
        let telemetry = Telemetry::new("test");
        let stuck =
            tower::service_fn(|_: Request<()>| std::future::pending::<Result<Response<Full<Bytes>>, Infallible>>());
        drop(layer(&telemetry).layer(stuck).oneshot(request("/s.S/Stream", None)).now_or_never());
        assert!(counted(&telemetry, "Stream", "CANCELLED"));
    }

    trait NowOrNever: Future + Sized {
        fn now_or_never(self) -> Option<Self::Output> {
            let mut this = Box::pin(self);
            match this.as_mut().poll(&mut Context::from_waker(std::task::Waker::noop())) {
                Poll::Ready(output) => Some(output),
                Poll::Pending => None,
            }
        }
    }

    impl<F: Future> NowOrNever for F {}
}
