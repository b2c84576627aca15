package recipes

import (
	"context"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/aws/aws-lambda-go/events"
	"github.com/awslabs/aws-lambda-go-api-proxy/httpadapter"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

// lambdaFunc is for lambda.Start.
type lambdaFunc = func(ctx context.Context, event events.APIGatewayProxyRequest) (events.APIGatewayProxyResponse, error)

func lambdaFunction(idem *middleware.Middleware, pay http.Handler) lambdaFunc {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /payments/{account}", func(w http.ResponseWriter, r *http.Request) {
		endInTime(r.Context(), idem).Handler(pay).ServeHTTP(w, r)
	})
	return httpadapter.New(mux).ProxyWithContext
}

// endInTime fits the middleware's timeouts into the time that Lambda gives, so that no transaction
// is open while the function is frozen.
func endInTime(ctx context.Context, idem *middleware.Middleware) *middleware.Middleware {
	deadline, ok := ctx.Deadline()
	if !ok {
		return idem
	}
	left := max(time.Until(deadline), time.Second)
	return idem.With(func(o *middleware.Options) {
		o.Timeouts = idempotency.Timeouts{Handler: left / 2, Commit: left / 8, Resolve: left / 8, Rollback: left / 8}
	})
}

// apiGateway is the HTTP side of a Lambda function. As Lambda, it lets the function run on if the
// client leaves.
func apiGateway(function lambdaFunc, timeout time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), timeout)
		defer cancel()
		answer, err := function(ctx, events.APIGatewayProxyRequest{
			HTTPMethod: r.Method, Path: r.URL.Path, MultiValueHeaders: r.Header, Body: string(body),
			MultiValueQueryStringParameters: r.URL.Query(),
		})
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		for name, values := range answer.MultiValueHeaders {
			if name != "Content-Type" || answer.Body != "" { // httpadapter says text/plain of no body
				w.Header()[name] = values
			}
		}
		w.WriteHeader(answer.StatusCode)
		_, _ = io.WriteString(w, answer.Body)
	})
}

func TestLambda(t *testing.T) {
	t.Parallel()
	features := noErrors
	features.NoStream, features.NoHijack = true, true
	mwtest.Run(t, features, func(s *mwtest.Service) string {
		return s.Serve(payments(apiGateway(lambdaFunction(s.Middleware, s.Handler), time.Minute)))
	})
}

// All that the middleware may take ends before Lambda freezes the function.
func TestLambdaEndsInTime(t *testing.T) {
	t.Parallel()
	var handlers time.Time
	s := mwtest.New(t, nil)
	function := lambdaFunction(s.Middleware, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handlers, _ = r.Context().Deadline()
		w.WriteHeader(http.StatusNoContent)
	}))
	const timeout = 8 * time.Second // by default the handler alone has 10
	frozen := time.Now().Add(timeout)
	ctx, cancel := context.WithDeadline(t.Context(), frozen)
	defer cancel()
	answer, err := function(ctx, events.APIGatewayProxyRequest{
		HTTPMethod: http.MethodPost, Path: "/payments/acme", Headers: map[string]string{"Idempotency-Key": "key-1"},
	})
	if err != nil || answer.StatusCode != http.StatusNoContent {
		t.Fatalf("%+v, %v", answer, err)
	}
	if !handlers.Before(frozen) {
		t.Errorf("the handler's deadline is %v after Lambda's", handlers.Sub(frozen))
	}
	endInTime(ctx, s.Middleware).With(func(o *middleware.Options) {
		if sum := o.Timeouts.Handler + o.Timeouts.Commit + o.Timeouts.Resolve + o.Timeouts.Rollback; sum > timeout {
			t.Errorf("the timeouts sum up to %v, and Lambda gives %v", sum, timeout)
		}
	})
}
