package middleware

import (
	"context"
	"reflect"
)

// mayCarryChiRoute reports whether chi may have routed a request with this context. chi keeps its
// state in one value that routing changes in place, so that a second run may be routed to a 404,
// which would be recorded for good. It is called only before a second run.
//
// This package does not import chi, so it does not have chi's key. It walks the chain of contexts
// for a key of chi's type. It never reads or prints a value in them: they belong to other packages,
// which may change them at the same time. The contexts of package context are immutable. A context
// of any other package is opaque and may hide chi's, so it returns true.
func mayCarryChiRoute(ctx context.Context) bool {
	for c := reflect.ValueOf(ctx); ; {
		for c.Kind() == reflect.Interface || c.Kind() == reflect.Pointer {
			c = c.Elem()
		}
		if c.Kind() != reflect.Struct || c.Type().PkgPath() != "context" {
			return true
		}
		switch c.Type().Name() {
		case "backgroundCtx", "todoCtx":
			return false
		}
		if key := c.FieldByName("key"); key.IsValid() && key.Elem().Type().String() == "*chi.contextKey" {
			return true
		}
		below := c.FieldByName("Context")
		if !below.IsValid() {
			below = c.FieldByName("c") // of a WithoutCancel
		}
		if !below.IsValid() {
			return true
		}
		c = below
	}
}

// onFasthttp reports whether fasthttp's context is at the bottom of the chain. Like mayCarryChiRoute
// it looks only through the contexts of package context, whose first field is the one below. It
// allocates nothing.
func onFasthttp(ctx context.Context) bool {
	fasthttps := reflect.TypeFor[interface{ VisitUserValuesAll(func(key, value any)) }]()
	for c := reflect.ValueOf(ctx); c.IsValid(); {
		switch {
		case c.Kind() == reflect.Interface:
			c = c.Elem()
		case c.Type().Implements(fasthttps):
			return true
		case c.Kind() == reflect.Pointer:
			c = c.Elem()
		case c.Kind() == reflect.Struct && c.Type().PkgPath() == "context" && c.NumField() > 0:
			c = c.Field(0)
		default:
			return false
		}
	}
	return false
}
